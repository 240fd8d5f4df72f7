"""The server, asked by OpenAI's and Anthropic's own clients and by hand."""

import asyncio
import json
import re
import shutil
import threading
import time

import anthropic
import jsonschema
import openai
import pytest
from bundles import make_drafter, make_folder
from serving import Scripted, get, make_tools_folder, post, serving

from mlx_redrafter import Sampling, load, stream_generate
from mlx_redrafter.options import ModelOptions
from mlx_redrafter.server import catalog, output
from mlx_redrafter.server.run import Settings, _make, listen, make_server

SAYS = "Hé🙂好w!"
TOOL = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "of a city",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
    },
}
CALL = '<tool_call>\n{"name": "weather", "arguments": {"city": "Zürich"}}\n</tool_call>'
HELLO = [{"role": "user", "content": "the quick brown fox"}]


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("models")
    base = make_folder(root / "base", SAYS)
    make_drafter(root / "drafter", base)
    make_folder(root / "random", kind="random", max_position_embeddings=4096)
    make_tools_folder(root / "tools")
    return root


@pytest.fixture(scope="module")
def served(folders):
    with serving(folders / "random", model_dir=[folders]) as found:
        yield found


@pytest.fixture(scope="module")
def tools(folders):
    with serving(folders / "tools") as found:
        yield found


@pytest.fixture
def client(served):
    return openai.OpenAI(base_url=f"{served.url}/v1", api_key="none", max_retries=0)


@pytest.fixture
def tools_client(tools):
    return openai.OpenAI(base_url=f"{tools.url}/v1", api_key="none", max_retries=0)


@pytest.fixture
def claude(tools):
    return anthropic.Anthropic(base_url=tools.url, api_key="none", max_retries=0)


@pytest.fixture(scope="module")
def reference(folders):
    """What ``stream_generate`` says of messages."""
    model, tokenizer = load(folders / "random", drafter=None)

    def say(messages, max_tokens, **options):
        ids = tokenizer.apply_chat_template(messages, add_generation_prompt=True)
        found = list(stream_generate(model, tokenizer, ids, max_tokens, draft=False, **options))
        return "".join(each.text for each in found), found

    return say


def streamed(stream):
    """The chunks of a stream, and the text of its first choice."""
    chunks = list(stream)
    text = "".join(c.choices[0].delta.content or "" for c in chunks if c.choices and c.choices[0].index == 0)
    return chunks, text


# --- Chat ------------------------------------------------------------------------------------------------


def test_greedy_answers_are_those_of_generate(client, reference):
    expected, _ = reference(HELLO, 40)
    whole = client.chat.completions.create(model="default", messages=HELLO, max_tokens=40, temperature=0)
    assert whole.choices[0].message.content == expected
    assert whole.choices[0].finish_reason == "length" and whole.usage.completion_tokens == 40
    for draft in (True, False):
        chunks, text = streamed(
            client.chat.completions.create(
                model="default",
                messages=HELLO,
                max_completion_tokens=40,
                stream=True,
                stream_options={"include_usage": True},
                extra_body={"draft": draft},
            )
        )
        assert text == expected
        assert chunks[-1].choices == [] and chunks[-1].usage.completion_tokens == 40
        assert (chunks[-1].usage.steps == 39) or draft
        drafted = [piece for chunk in chunks for piece in (chunk.model_extra or {}).get("drafted", [])]
        assert "".join(text for text, _ in drafted) == expected
        assert draft or not any(was for _, was in drafted)


def test_a_seed_gives_the_text_of_generate_alone_and_in_company(client, reference):
    asked = {"model": "default", "temperature": 0.8, "top_p": 0.9, "max_tokens": 30}
    prompts = [[{"role": "user", "content": f"the quick brown {n} fox"}] for n in range(8)]
    expected = [
        reference(messages, 30, seed=n, sampling=Sampling(0.8, top_p=0.9))[0]
        for n, messages in enumerate(prompts)
    ]
    found = [None] * len(prompts)

    def ask(n):
        time.sleep(0.03 * (n % 3))
        found[n] = streamed(
            client.chat.completions.create(messages=prompts[n], seed=n, stream=True, **asked)
        )[1]

    threads = [threading.Thread(target=ask, args=(n,)) for n in range(len(prompts))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == expected
    assert (
        streamed(client.chat.completions.create(messages=prompts[3], seed=3, stream=True, **asked))[1]
        == expected[3]
    )


def test_several_choices_differ_by_their_seeds(client):
    asked = {"model": "default", "messages": HELLO, "temperature": 1.0, "max_tokens": 12}
    several = client.chat.completions.create(n=3, seed=5, **asked)
    texts = [choice.message.content for choice in several.choices]
    assert len(set(texts)) == 3 and [choice.index for choice in several.choices] == [0, 1, 2]
    assert client.chat.completions.create(seed=6, **asked).choices[0].message.content == texts[1]
    chunks = list(client.chat.completions.create(n=3, seed=5, stream=True, **asked))
    said = ["", "", ""]
    for chunk in chunks:
        for choice in chunk.choices:
            said[choice.index] += choice.delta.content or ""
    assert said == texts


def test_log_probabilities_are_the_models(client, reference):
    expected, steps = reference(HELLO, 6)
    found = client.chat.completions.create(
        model="default", messages=HELLO, max_tokens=6, logprobs=True, top_logprobs=3
    )
    content = found.choices[0].logprobs.content
    assert len(content) == 6
    assert b"".join(bytes(each.bytes) for each in content).decode("utf-8", "replace") == expected
    for each, step in zip(content, steps, strict=True):
        assert each.logprob == pytest.approx(step.logprobs[step.token].item(), abs=1e-4)
        assert [top.logprob for top in each.top_logprobs] == sorted(
            (top.logprob for top in each.top_logprobs), reverse=True
        )
        assert each.top_logprobs[0].token == each.token  # greedy
    chunks = list(
        client.chat.completions.create(
            model="default", messages=HELLO, max_tokens=6, logprobs=True, top_logprobs=3, stream=True
        )
    )
    said = [
        each for c in chunks if c.choices and c.choices[0].logprobs for each in c.choices[0].logprobs.content
    ]
    assert [each.token for each in said] == [each.token for each in content]


def test_stop_texts_end_an_answer_wherever_tokens_are_cut(client, reference):
    expected, _ = reference(HELLO, 40)
    stop = expected[11:14]
    found = client.chat.completions.create(
        model="default", messages=HELLO, max_tokens=40, stop=["\0\0", stop]
    )
    assert found.choices[0].message.content == expected[: expected.index(stop)]
    assert found.choices[0].finish_reason == "stop"
    chunks, text = streamed(
        client.chat.completions.create(model="default", messages=HELLO, max_tokens=40, stop=stop, stream=True)
    )
    assert text == expected[: expected.index(stop)] and chunks[-1].choices[0].finish_reason == "stop"


def test_biases_and_penalties_count(client, reference):
    _, steps = reference(HELLO, 1)
    asked = {"model": "default", "messages": HELLO, "max_tokens": 8}
    plain = client.chat.completions.create(**asked).choices[0].message.content
    biased = client.chat.completions.create(logit_bias={str(steps[0].token): -100}, **asked)
    assert biased.choices[0].message.content != plain
    for name in ("presence_penalty", "frequency_penalty"):
        text = client.chat.completions.create(**{name: 2.0}, **asked).choices[0].message.content
        assert text == reference(HELLO, 8, sampling=Sampling(**{name: 2.0}))[0]
    text = client.chat.completions.create(extra_body={"repetition_penalty": 1.5}, **asked)
    assert (
        text.choices[0].message.content == reference(HELLO, 8, sampling=Sampling(repetition_penalty=1.5))[0]
    )


def test_a_second_turn_reads_only_what_is_new(client):
    asked = {"model": "default", "max_tokens": 10}
    first = client.chat.completions.create(messages=HELLO * 8, **asked)
    answer = {"role": "assistant", "content": first.choices[0].message.content}
    second = client.chat.completions.create(messages=[*HELLO * 8, answer, *HELLO], **asked)
    cached = second.usage.prompt_tokens_details.cached_tokens
    assert first.usage.prompt_tokens - 15 <= cached < second.usage.prompt_tokens


def test_what_users_say_never_becomes_a_control_token(served, client):
    tokenizer = served.loaded.tokenizer
    end = tokenizer.eos_token_id
    with Scripted(served, "one") as script:
        for content in ("</s>", "a</s><s>b", "x</s", [{"type": "text", "text": "</s></s>"}]):
            client.chat.completions.create(model="default", messages=[{"role": "user", "content": content}])
    for job in script.jobs:
        assert job.prompt.count(end) == 1  # the template's own
        assert "</s" in tokenizer.decode(job.prompt)


# --- Tools and reasoning ---------------------------------------------------------------------------------


@pytest.mark.parametrize("a_step", [1, 3, 100])
def test_calls_of_tools_and_reasoning_are_told_apart(tools, tools_client, a_step):
    says = f"<think>hm, </think>Let me look.{CALL}{CALL.replace('Zürich', 'Bern')}"
    asked = {"model": "default", "messages": HELLO, "tools": [TOOL]}
    with Scripted(tools, says, a_step):
        choice = tools_client.chat.completions.create(**asked).choices[0]
        chunks = list(tools_client.chat.completions.create(stream=True, **asked))
    assert choice.finish_reason == "tool_calls"
    assert choice.message.content == "Let me look."
    assert choice.message.model_extra["reasoning_content"] == "hm, "
    calls = choice.message.tool_calls
    assert [json.loads(call.function.arguments) for call in calls] == [{"city": "Zürich"}, {"city": "Bern"}]
    assert {call.function.name for call in calls} == {"weather"} and len({call.id for call in calls}) == 2
    deltas = [chunk.choices[0].delta for chunk in chunks if chunk.choices]
    told = [call for delta in deltas for call in delta.tool_calls or []]
    heads = [call for call in told if call.id]
    assert [call.index for call in heads] == [0, 1] and len({call.id for call in heads}) == 2
    assert [call.function.name for call in heads] == ["weather"] * 2 and heads[0].type == "function"
    for place, city in enumerate(("Zürich", "Bern")):
        parts = [call.function.arguments for call in told if call.index == place]
        assert json.loads("".join(parts)) == {"city": city}
        assert (len(parts) > 5) == (a_step < 100)  # as they are written
    assert "".join(delta.content or "" for delta in deltas) == "Let me look."
    assert "".join((delta.model_extra or {}).get("reasoning_content", "") for delta in deltas) == "hm, "
    assert chunks[-1].choices[0].finish_reason == "tool_calls"
    for name, said in (("drafted", "Let me look."), ("drafted_reasoning", "hm, ")):
        drafted = [piece for chunk in chunks for piece in (chunk.model_extra or {}).get(name, [])]
        assert "".join(text for text, _ in drafted) == said
        assert any(was for _, was in drafted) == (a_step > 1)


def test_a_call_that_is_none_stays_a_text(tools, tools_client):
    with Scripted(tools, "<tool_call>{oh</tool_call> well"):
        choice = tools_client.chat.completions.create(model="default", messages=HELLO, tools=[TOOL]).choices[
            0
        ]
    assert choice.message.content == "<tool_call>{oh</tool_call> well" and choice.message.tool_calls is None
    assert choice.finish_reason == "stop"


@pytest.mark.parametrize("a_step", [1, 4])
def test_tokens_of_reasoning_are_counted(tools, tools_client, a_step):
    def tokens(text):
        return len(tools.loaded.tokenizer.encode(text, add_special_tokens=False))

    cases = (("<think>one two</think>three", "<think>one two"), ("three", ""), ("<think>a", "<think>a"))
    for says, thought in cases:
        with Scripted(tools, says, a_step):
            chat = tools_client.chat.completions.create(model="default", messages=HELLO).usage
            *_, last = tools_client.chat.completions.create(
                model="default", messages=HELLO, stream=True, stream_options={"include_usage": True}
            )
            response = tools_client.responses.create(model="default", input="x").usage
        assert chat.completion_tokens_details.reasoning_tokens == tokens(thought)
        assert last.usage.completion_tokens_details.reasoning_tokens == tokens(thought)
        assert response.output_tokens_details.reasoning_tokens == tokens(thought)
        assert response.output_tokens == tokens(says) + 1  # the end of text


CUT = {  # calls that are none: what is told of their arguments by then
    '{"name": "f", "arguments": {"a": "b", "c": NaN}}': '{"a": "b", "c":',
    '{"name": "f", "arguments": {"a": "b"}, oh}': '{"a": "b"',
    '{"name": "f", "arguments": {"a": "b" oh}}': '{"a": "b"',
    '{"name": "f", "arguments": [1]}': None,
    '{"arguments": {"a": 1}, "name"': None,
    '{"name": "f\\ud800", "arguments": {}}': None,
}


@pytest.mark.parametrize("says", CUT)
def test_a_call_that_turns_out_to_be_none_is_cut_where_it_was_json(tools, tools_client, claude, says):
    tool = {"name": "f", "input_schema": {"type": "object"}}
    function = {"type": "function", "name": "f", "parameters": {"type": "object"}}
    with Scripted(tools, f"<tool_call>{says}</tool_call>", a_step=1):
        asked = {"model": "default", "messages": HELLO, "tools": [TOOL]}
        chunks = list(tools_client.chat.completions.create(stream=True, **asked))
        asked = {"model": "default", "messages": HELLO, "tools": [tool], "max_tokens": 500}
        with claude.messages.stream(**asked) as stream:
            message = stream.get_final_message()
        events = list(
            tools_client.responses.create(model="default", input="x", tools=[function], stream=True)
        )
    deltas = [chunk.choices[0].delta for chunk in chunks]
    told = [call.function.arguments for delta in deltas for call in delta.tool_calls or []]
    content = "".join(delta.content or "" for delta in deltas)
    item = events[-1].response.output[0]
    if CUT[says] is None:
        assert not told and says in content and item.type == "message" and message.content[0].type == "text"
        return
    assert "".join(told).startswith(CUT[says]) and not content
    assert chunks[-1].choices[0].finish_reason == "stop"
    assert message.content[0].input["a"] == "b" and item.type == "function_call"
    again = tools_client.responses.create(
        model="default", previous_response_id=events[-1].response.id, input="y", max_output_tokens=2
    )
    assert again.status == "incomplete" and (item.status == "completed") == says.endswith("oh}")


@pytest.mark.parametrize("longest", [1 << 15, 40])
def test_calls_are_whole_whatever_is_in_them_and_however_long(tools, tools_client, longest, monkeypatch):
    monkeypatch.setattr(output, "LONGEST_PARTS", longest)
    for arguments in (
        {},
        {"a": {"b": [{}, {"c": '}}"}{'}], "d": None}, "e": "\\ud83d😀"},
        {"a": 1.5e-7, "b": -1, "c": [[], [True, False]], "": ""},
    ):
        call = json.dumps({"name": "f", "arguments": arguments})
        for name in ("", ', "id": 3'):
            with Scripted(tools, f"<tool_call>{call[:-1]}{name}}}</tool_call>", a_step=1):
                asked = {"model": "default", "messages": HELLO, "tools": [TOOL]}
                chunks = list(tools_client.chat.completions.create(stream=True, **asked))
            told = [call for chunk in chunks for call in chunk.choices[0].delta.tool_calls or []]
            assert json.loads("".join(call.function.arguments for call in told)) == arguments
            assert [call.function.name for call in told if call.id] == ["f"]
            assert chunks[-1].choices[0].finish_reason == "tool_calls"


def test_templates_are_told_of_tools_and_of_calls(tools, tools_client):
    conversation = [
        *HELLO,
        {
            "role": "assistant",
            "content": None,
            "tool_calls": [
                {
                    "id": "c1",
                    "type": "function",
                    "function": {"name": "weather", "arguments": '{"city": "Bern"}'},
                }
            ],
        },
        {"role": "tool", "tool_call_id": "c1", "content": "rain"},
    ]
    with Scripted(tools, "It rains.") as script:
        tools_client.chat.completions.create(model="default", messages=conversation, tools=[TOOL])
        tools_client.chat.completions.create(
            model="default", messages=conversation, tools=[TOOL], tool_choice="none"
        )
    told, untold = (tools.loaded.tokenizer.decode(job.prompt) for job in script.jobs)
    assert '"of a city"' in told and '<tool_call>weather {"city": "Bern"}</tool_call>' in told
    assert "<tool>rain" in told and "<tools>" not in untold


def test_templates_that_expect_arguments_as_texts(folders, tmp_path):
    folder = tmp_path / "deepseek"
    shutil.copytree(folders / "random", folder)
    config = json.loads((folder / "tokenizer_config.json").read_text())
    told = config | {"chat_template_type": "deepseek_v32"}
    (folder / "tokenizer_config.json").write_text(json.dumps(told))
    function = {"name": "weather", "arguments": '{"city": "Zürich", "n": 2}'}
    called = {"role": "assistant", "tool_calls": [{"id": "c", "type": "function", "function": function}]}
    messages = [*HELLO, called, {"role": "tool", "tool_call_id": "c", "content": "rain"}, *HELLO]
    turns = [{"role": "assistant", "content": [{"type": "tool_use", "name": "weather", "input": {"n": 2}}]}]
    with serving(folder) as served, Scripted(served, "So.") as script:
        for path, conversation in (("chat/completions", messages), ("messages", [*HELLO, *turns, *HELLO])):
            body = {"messages": conversation, "max_tokens": 5}
            answer = post(f"{served.url}/v1/{path}", json=body)
            assert answer.status_code == 200, answer.text
        prompts = [served.loaded.tokenizer.decode(job.prompt) for job in script.jobs]
    assert 'invoke name="weather"' in prompts[0] and 'string="true">Zürich<' in prompts[0]
    assert '"n" string="false">2<' in prompts[0] and '"n" string="false">2<' in prompts[1]
    assert "<result>rain</result>" in prompts[0]


# --- Completions -----------------------------------------------------------------------------------------


def test_completions(client, served):
    tokenizer = served.loaded.tokenizer
    ids = tokenizer.encode("the quick brown")
    several = client.completions.create(model="default", prompt=["the quick brown", "fox"], max_tokens=5, n=2)
    assert [choice.index for choice in several.choices] == [0, 1, 2, 3]
    assert several.choices[0].text == several.choices[1].text != several.choices[2].text
    by_ids = client.completions.create(model="default", prompt=ids, max_tokens=5, echo=True, logprobs=2)
    assert by_ids.choices[0].text == "the quick brown" + several.choices[0].text
    logprobs = by_ids.choices[0].logprobs
    assert len(logprobs.tokens) == 5 and all(len(top) == 2 for top in logprobs.top_logprobs)
    chunks = list(
        client.completions.create(model="default", prompt="the quick brown", max_tokens=5, stream=True)
    )
    assert "".join(chunk.choices[0].text for chunk in chunks) == several.choices[0].text


# --- Responses -------------------------------------------------------------------------------------------


def test_responses(tools, tools_client):
    says = f"<think>hm</think>Let me look.{CALL}"
    function = {"type": "function", **TOOL["function"]}
    with Scripted(tools, [says, says, "Rain."]) as script:
        whole = tools_client.responses.create(
            model="default", input="How is it?", instructions="Be brief.", tools=[function]
        )
        events = list(
            tools_client.responses.create(model="default", input="So?", tools=[function], stream=True)
        )
        call = next(item for item in whole.output if item.type == "function_call")
        output = {"type": "function_call_output", "call_id": call.call_id, "output": "rain"}
        then = tools_client.responses.create(
            model="default", previous_response_id=whole.id, input=[output], tools=[function]
        )
    assert [item.type for item in whole.output] == ["reasoning", "message", "function_call"]
    assert whole.output_text == "Let me look." and whole.status == "completed"
    assert json.loads(call.arguments) == {"city": "Zürich"}
    assert then.output_text == "Rain."
    prompt = tools.loaded.tokenizer.decode(script.jobs[-1].prompt)
    assert all(text in prompt for text in ("How is it?", "Let me look.", '{"city": "Zürich"}', "<tool>rain"))
    kinds = [event.type for event in events]
    assert kinds[:2] == ["response.created", "response.in_progress"] and kinds[-1] == "response.completed"
    assert [event.sequence_number for event in events] == list(range(len(events)))
    text = "".join(event.delta for event in events if event.type == "response.output_text.delta")
    assert text == "Let me look." == events[-1].response.output_text
    assert [item.type for item in events[-1].response.output] == ["reasoning", "message", "function_call"]
    assert kinds.count("response.output_item.done") == 3
    with tools_client.responses.stream(model="default", input="So?") as stream, Scripted(tools, "Well."):
        assert stream.get_final_response().output_text


def test_a_response_that_is_cut_is_incomplete(tools_client):
    cut = tools_client.responses.create(model="default", input="So?", max_output_tokens=3)
    assert cut.status == "incomplete" and cut.incomplete_details.reason == "max_output_tokens"
    with pytest.raises(openai.BadRequestError, match="not known"):
        tools_client.responses.create(model="default", input="So?", previous_response_id="resp_0")


# --- Anthropic's messages --------------------------------------------------------------------------------


def test_messages(tools, claude):
    says = f"<think>hm</think>Let me look.{CALL}"
    tool = {"name": "weather", "description": "of a city", "input_schema": TOOL["function"]["parameters"]}
    asked = {"model": "default", "max_tokens": 500, "system": "Be brief.", "tools": [tool], "messages": HELLO}
    with Scripted(tools, [says, says, "Rain."]) as script:
        whole = claude.messages.create(**asked)
        with claude.messages.stream(**asked) as stream:
            text = "".join(stream.text_stream)
            final = stream.get_final_message()
        call = whole.content[-1]
        turns = [
            {"role": "assistant", "content": [block.model_dump() for block in whole.content]},
            {"role": "user", "content": [{"type": "tool_result", "tool_use_id": call.id, "content": "rain"}]},
        ]
        then = claude.messages.create(**{**asked, "messages": [*HELLO, *turns]})
    for message in (whole, final):
        assert [block.type for block in message.content] == ["thinking", "text", "tool_use"]
        assert message.content[-1].input == {"city": "Zürich"} and message.stop_reason == "tool_use"
    assert text == "Let me look." == whole.content[1].text
    assert then.content[0].text == "Rain." and then.stop_reason == "end_turn"
    assert "<tool>rain" in tools.loaded.tokenizer.decode(script.jobs[-1].prompt)


def test_counting_stopping_and_going_on(tools, claude):
    asked = {"model": "default", "messages": [*HELLO, {"role": "assistant", "content": "So it is"}]}
    with Scripted(tools, "one two three") as script:
        stopped = claude.messages.create(max_tokens=50, stop_sequences=["two"], **asked)
    assert stopped.content[0].text == "one " and stopped.stop_sequence == "two"
    assert stopped.stop_reason == "stop_sequence"
    assert tools.loaded.tokenizer.decode(script.jobs[0].prompt).endswith("<assistant>So it is")
    assert claude.messages.count_tokens(**asked).input_tokens == len(script.jobs[0].prompt)
    with pytest.raises(anthropic.BadRequestError, match="only text"):
        image = {"type": "image", "source": {"type": "url", "url": "http://x/y.png"}}
        claude.messages.create(max_tokens=5, model="default", messages=[{"role": "user", "content": [image]}])


# --- What is wrong ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "param"),
    [
        ({"temperature": -1}, "temperature"),
        ({"temperature": "hot"}, "temperature"),
        ({"temperature": 3}, "temperature"),
        ({"top_p": 1.5}, "top_p"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"n": 0}, "n"),
        ({"messages": []}, "messages"),
        ({"messages": [{"role": "king", "content": "x"}]}, "messages.0.role"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "messages"),
        ({"logit_bias": {"x": 1}}, "logit_bias"),
        ({"logit_bias": {"100000": 1}}, "logit_bias"),
        ({"top_logprobs": 5}, None),
        ({"stop": ""}, "stop"),
        ({"tool_choice": "required"}, None),
        ({"seed": 1.5}, "seed"),
    ],
)
def test_wrong_values_are_named(served, change, param):
    body = {"model": "default", "messages": HELLO, "max_tokens": 4, **change}
    response = post(f"{served.url}/v1/chat/completions", json=body)
    error = response.json()["error"]
    assert response.status_code == 400 and error["type"] == "invalid_request_error", error
    assert error["param"] == param and error["message"]


def test_unknown_models_paths_and_fields(served, client):
    with pytest.raises(openai.NotFoundError, match="no model 'gpt-9'"):
        client.chat.completions.create(model="gpt-9", messages=HELLO)
    assert get(f"{served.url}/v2").status_code == 404
    assert get(f"{served.url}/v1/chat/completions").status_code == 405
    body = {"model": "default", "messages": HELLO, "max_tokens": 2, "frobnicate": 1, "user": "me"}
    assert post(f"{served.url}/v1/chat/completions", json=body).status_code == 200


def test_prompts_that_are_too_long(client):
    with pytest.raises(openai.BadRequestError, match="more than the model's context of 4096") as caught:
        client.completions.create(model="default", prompt=[5] * 5000)
    assert caught.value.code == "context_length_exceeded"


def test_models_by_name_are_loaded_when_asked_for(served, client):
    names = [model.id for model in client.models.list()]
    assert {"base", "tools"} <= set(names) and "drafter" not in names
    said = client.chat.completions.create(
        model="base", messages=[{"role": "user", "content": "x>"}], max_tokens=9
    )
    assert said.choices[0].message.content
    client.chat.completions.create(model="tools", messages=HELLO, max_tokens=2)
    assert len(served.server.service.catalog.loaded) == 2  # the least recently used one was let go
    client.chat.completions.create(model="default", messages=HELLO, max_tokens=2)


def test_a_client_that_leaves_frees_its_row(served, client):
    stream = client.chat.completions.create(model="default", messages=HELLO, max_tokens=3000, stream=True)
    next(iter(stream))
    stream.close()
    deadline = time.monotonic() + 10
    while (served.loaded.served.texts or served.server.service.generations) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert served.loaded.served.texts == 0 and not served.server.service.generations


def test_metrics_and_health(served, client):
    client.chat.completions.create(model="default", messages=HELLO, max_tokens=8)
    text = get(f"{served.url}/metrics").text
    assert 'mlx_redrafter_tokens_total{kind="completion"}' in text
    assert 'mlx_redrafter_requests_total{path="/v1/chat/completions",status="200"}' in text
    assert get(f"{served.url}/health").json() == {"status": "ok"}


def test_what_was_read_is_known_after_a_restart(folders, tmp_path):
    body = {"model": "default", "messages": HELLO * 20, "max_tokens": 5}
    found = []
    for _ in range(2):
        with serving(folders / "random", prompt_cache_dir=tmp_path / "kept") as served:
            found.append(post(f"{served.url}/v1/chat/completions", json=body).json())
    cached = [each["usage"]["prompt_tokens_details"]["cached_tokens"] for each in found]
    assert cached == [0, found[0]["usage"]["prompt_tokens"] - 1]
    assert found[0]["choices"] == found[1]["choices"]


def test_models_that_nobody_asks_for_are_let_go(folders):
    with serving(folders / "random", idle_unload=0.2) as served:
        body = {"model": "default", "messages": HELLO, "max_tokens": 5}
        first = post(f"{served.url}/v1/chat/completions", json=body).json()
        catalog, deadline = served.server.service.catalog, time.monotonic() + 15
        while catalog.loaded and time.monotonic() < deadline:
            time.sleep(0.1)
        assert not catalog.loaded
        again = post(f"{served.url}/v1/chat/completions", json=body, timeout=30).json()
        assert again["choices"] == first["choices"]


# --- Structured output -----------------------------------------------------------------------------------

PERSON = {
    "type": "object",
    "properties": {"name": {"enum": ["Ada", "Bob"]}, "age": {"type": "integer", "minimum": 0, "maximum": 99}},
    "required": ["name", "age"],
    "additionalProperties": False,
}


@pytest.mark.parametrize("temperature", [0, 1.0])
@pytest.mark.parametrize("draft", [True, False])
def test_answers_follow_a_schema(client, temperature, draft):
    asked = {
        "model": "default",
        "messages": HELLO,
        "temperature": temperature,
        "seed": 3,
        "response_format": {"type": "json_schema", "json_schema": {"name": "person", "schema": PERSON}},
        "extra_body": {"draft": draft},
    }
    text = client.chat.completions.create(**asked).choices[0].message.content
    jsonschema.validate(json.loads(text), PERSON)
    assert streamed(client.chat.completions.create(stream=True, **asked))[1] == text
    asked["extra_body"] = {"draft": not draft}
    assert client.chat.completions.create(**asked).choices[0].message.content == text


def test_answers_follow_patterns_choices_and_grammars(client):
    asked = {"model": "default", "messages": HELLO, "temperature": 1.0, "seed": 1}
    for form, pattern in (
        ({"guided_regex": "[ab]{3}-[0-9]{2}"}, "[ab]{3}-[0-9]{2}"),
        ({"guided_choice": ["red wine", "blue"]}, "red wine|blue"),
        ({"guided_grammar": 'start: "x" NUMBER\nNUMBER: /[0-9]{2}/'}, "x[0-9]{2}"),
        ({"response_format": {"type": "regex", "pattern": "(ha){2,4}!"}}, "(ha){2,4}!"),
    ):
        said = client.chat.completions.create(extra_body=form, **asked).choices[0]
        assert re.fullmatch(pattern, said.message.content) and said.finish_reason == "stop"
    said = client.completions.create(
        model="default", prompt="x", max_tokens=40, extra_body={"guided_regex": "yes|no"}
    )
    assert said.choices[0].text in ("yes", "no")
    form = {"format": {"type": "json_schema", "name": "person", "schema": PERSON}}
    said = client.responses.create(model="default", input="x", text=form)
    jsonschema.validate(json.loads(said.output_text), PERSON)


def test_grammars_that_cannot_be_are_refused(served):
    for form in (
        {"response_format": {"type": "json_schema", "json_schema": {"schema": {"type": "nothing"}}}},
        {"response_format": {"type": "json_schema"}},
        {"guided_regex": "(" * 10},
        {"guided_regex": "a{1,999999}"},
        {"guided_grammar": "start: start start"},
        {"guided_json": "{"},
        {"guided_choice": []},
    ):
        body = {"model": "default", "messages": HELLO, "max_tokens": 4, **form}
        response = post(f"{served.url}/v1/chat/completions", json=body, timeout=30)
        assert response.status_code == 400, (form, response.text)
        assert response.json()["error"]["message"]


def test_a_grammar_that_leads_nowhere_is_the_requests_fault(served):
    form = {"guided_grammar": 'start: "a" never\nnever: never "x"'}
    for path, kind in (
        ("chat/completions", "invalid_request_error"),
        ("completions", "invalid_request_error"),
        ("messages", "invalid_request_error"),
        ("responses", "invalid_prompt"),
    ):
        body = {"messages": HELLO, "prompt": "x", "input": "x", "max_tokens": 9, **form}
        answer = post(f"{served.url}/v1/{path}", json={**body, "stream": True})
        error = json.loads(answer.text.strip().split("data: ")[-1])
        error = error.get("error") or error["response"]["error"]
        assert (error.get("type") or error["code"]) == kind and "cannot be followed" in error["message"]
        assert post(f"{served.url}/v1/{path}", json=body).status_code == 400


def test_health_is_told_while_the_model_is_loading(folders, monkeypatch):
    goes_on, load_model = threading.Event(), catalog.load_model
    monkeypatch.setattr(catalog, "load_model", lambda *a: goes_on.wait(60) and load_model(*a))
    listening = listen("127.0.0.1", 0)
    server = _make(Settings(ModelOptions(str(folders / "base"), drafter="none")))
    thread = threading.Thread(target=asyncio.run, args=(server.serve([listening]),))
    thread.start()
    url = f"http://127.0.0.1:{listening.getsockname()[1]}"
    told = get(f"{url}/health", timeout=60)
    assert told.status_code == 503 and told.json() == {"status": "loading"}
    goes_on.set()
    asked = {"model": "default", "messages": HELLO, "max_tokens": 2}
    assert post(f"{url}/v1/chat/completions", json=asked, timeout=60).status_code == 200
    assert get(f"{url}/health").json() == {"status": "ok"}
    server.should_exit = True
    thread.join(60)


def test_why_a_model_cannot_be_loaded_is_in_the_log_alone(folders, tmp_path, caplog):
    shutil.copytree(folders / "base", tmp_path / "broken")
    with serving(folders / "random", model_dir=[tmp_path]) as served:
        assert "broken" in [row["id"] for row in get(f"{served.url}/v1/models").json()["data"]]
        (tmp_path / "broken/model.safetensors").write_bytes(b"x")
        body = {"model": "broken", "messages": HELLO}
        answer = post(f"{served.url}/v1/chat/completions", json=body)
        assert answer.status_code == 503 and "'broken' cannot be loaded" in answer.json()["error"]["message"]
        assert "/" not in answer.text and str(tmp_path) in caplog.text
    with pytest.raises(ValueError, match=f"{tmp_path}/broken cannot be loaded: .*safetensors"):
        asyncio.run(make_server(Settings(ModelOptions(str(tmp_path / "broken"), drafter="none"))))


@pytest.mark.parametrize("choice", ["required", {"type": "function", "function": {"name": "weather"}}])
def test_calls_that_are_required_are_made(tools, tools_client, claude, choice):
    other = {"type": "function", "function": {"name": "time"}}
    asked = {"model": "default", "messages": HELLO, "temperature": 1.0, "seed": 2, "max_tokens": 300}
    for seed in range(3):
        asked["seed"] = seed
        found = tools_client.chat.completions.create(
            tools=[TOOL, other], tool_choice=choice, **asked
        ).choices[0]
        if found.finish_reason == "length":
            continue
        (call,) = found.message.tool_calls
        assert found.finish_reason == "tool_calls" and not found.message.content
        arguments = json.loads(call.function.arguments)
        assert call.function.name == "weather" or (choice == "required" and arguments == {})
        if call.function.name == "weather":
            jsonschema.validate(arguments, TOOL["function"]["parameters"])
        break
    else:
        pytest.fail("no call came to an end")
