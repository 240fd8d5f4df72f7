// The chat at "/": conversations live in this browser only, one entry of localStorage each, so that two tabs do
// not overwrite each other's. Each conversation may have an answer under way, seen or not (`jobs`).

import { element, render } from "./markdown.js";

const $ = (id) => document.getElementById(id);
const read = (key) => JSON.parse(localStorage.getItem(key));
const CHAT = "mlx-redrafter/chat/";
const SETTINGS = "mlx-redrafter/settings";
const PARAMETERS = ["temperature", "top_p", "max_tokens", "seed"];

const settings = { draft: true, colour: true, speeds: {}, ...read(SETTINGS) };
const kept = Object.keys(localStorage).filter((key) => key.startsWith(CHAT)).map(read);
const chats = new Map(kept.map((chat) => [chat.id, chat]));
const jobs = new Map(); // chat -> {stop: AbortController, note: what it waits for}
let current;

// --- What is kept ---------------------------------------------------------------------------------------------

function keep(key, value) {
  try {
    localStorage.setItem(key, JSON.stringify(value));
  } catch (error) { // full, or forbidden by the browser: the page goes on with what it has in memory
    warn(`This browser keeps nothing more (${error.message}). Delete old conversations.`);
  }
}
const keepSettings = () => keep(SETTINGS, settings);

function keepChat(chat) {
  if (chats.has(chat.id) && chat.messages.length) keep(CHAT + chat.id, { ...chat, at: (chat.at = Date.now()) });
}

function newChat() {
  const chat = { id: Date.now().toString(36) + Math.random().toString(36).slice(2), at: Date.now(), messages: [] };
  chats.set(chat.id, chat);
  return chat;
}

function deleteChat(chat) {
  if (!confirm(`Delete “${title(chat)}”?`)) return;
  jobs.get(chat)?.stop.abort();
  chats.delete(chat.id);
  localStorage.removeItem(CHAT + chat.id);
  open(chat === current ? latest() : current);
}

const newestFirst = () => [...chats.values()].filter(({ messages }) => messages.length).sort((a, b) => b.at - a.at);
const latest = () => newestFirst()[0] ?? newChat();
const title = ({ messages }) => messages[0].content.slice(0, 60);

// --- The server -----------------------------------------------------------------------------------------------

let asking; // several requests may find that they need the key, which is asked for once

function askKey(refused) {
  const form = $("key").querySelector("form");
  asking ??= new Promise((resolve) => {
    $("key-title").textContent = refused ? "The server did not accept this key" : "This server wants a key";
    $("key").returnValue = "";
    $("key").showModal();
    $("key").addEventListener("close", () => {
      asking = null;
      resolve($("key").returnValue === "given" ? form.key.value : null);
      form.reset();
    }, { once: true });
  });
  return asking;
}

async function call(path, options = {}) {
  for (;;) {
    const key = sessionStorage.getItem("mlx-redrafter/key");
    const headers = { "Content-Type": "application/json", ...(key && { Authorization: `Bearer ${key}` }) };
    const response = await fetch(path, { ...options, headers }).catch((error) => {
      throw error.name === "AbortError" ? error : new Error(`The server does not answer (${error.message}).`);
    });
    if (response.ok) return response;
    const given = response.status === 401 ? await askKey(key) : null;
    if (!given) {
      const { error } = await response.json().catch(() => ({}));
      throw new Error(error?.message ?? `The server says ${response.status} ${response.statusText}.`);
    }
    sessionStorage.setItem("mlx-redrafter/key", given);
  }
}

async function loadModels() {
  const { data } = await (await call("/v1/models")).json();
  const name = (id) => id.split("/").slice(-2).join("/"); // of a long path only its end
  const option = ({ id }) => element("option", { value: id, textContent: name(id), title: id });
  $("model").replaceChildren(...data.map(option));
  warn("");
  $("model").value = data.some(({ id }) => id === settings.model) ? settings.model : data[0]?.id;
  showSpeeds();
}

async function* linesOf(body) {
  const reader = body.pipeThrough(new TextDecoderStream()).getReader();
  try {
    let rest = "";
    for (let part; !(part = await reader.read()).done; ) {
      const found = (rest + part.value).split(/\r?\n/);
      rest = found.pop();
      yield* found;
    }
  } finally {
    reader.cancel().catch(() => {});
  }
}

// --- An answer ------------------------------------------------------------------------------------------------

async function answer(chat) {
  const said = chat.messages.filter(({ content }) => content).map(({ role, content }) => ({ role, content }));
  const message = {
    role: "assistant", content: "", reasoning: "", marks: { content: "", reasoning: "" }, draft: settings.draft,
    live: { tokens: 0, steps: 0 },
  };
  const job = { stop: new AbortController(), note: "Waiting for the model …" };
  jobs.set(chat, job);
  chat.messages.push(message);
  keepChat(chat);
  open(chat);
  say("Answering …");
  try {
    if (!$("model").value) await loadModels();
    message.model = $("model").value;
    const request = { model: message.model, draft: settings.draft, stream: true };
    request.stream_options = { include_usage: true };
    for (const name of PARAMETERS) if (settings[name]) request[name] = Number(settings[name]);
    request.messages = settings.system ? [{ role: "system", content: settings.system }, ...said] : said;
    const body = JSON.stringify(request);
    const response = await call("/v1/chat/completions", { method: "POST", body, signal: job.stop.signal });
    await listen(response.body, message, job, () => drawSoon(chat));
  } catch (error) {
    message.stopped = job.stop.signal.aborted;
    if (!message.stopped) message.error = error.message;
  }
  jobs.delete(chat);
  keepChat(chat);
  const { perSecond } = figures(message);
  if (perSecond && !message.error) {
    (settings.speeds[message.model] ??= {})[message.draft ? "on" : "off"] = perSecond;
    keepSettings();
  }
  if (chat !== current) return listChats();
  draw();
  say(message.error ? "" : $("log").lastElementChild.querySelector(":scope > .markdown").innerText);
}

/** Read a stream of server-sent events into a message, until its end. */
async function listen(body, message, job, changed) {
  const begun = performance.now();
  const { live } = message;
  let first; // when the first tokens came, and how many
  let done = false;
  for await (const line of linesOf(body)) {
    const read = /^: *keep-?alive (\d+)\/(\d+)/.exec(line);
    if (read) job.note = `Reading the prompt: ${read[1]} of ${read[2]} tokens …`;
    if (line === "data: [DONE]") done = true; // the connection's end follows, which leaves it fit for another request
    else if (line.startsWith("data: ")) {
      const { error, usage, choices: [choice] = [], ...chunk } = JSON.parse(line.slice(6));
      if (error) throw new Error(error.message);
      if (usage) message.usage = usage;
      if (choice?.finish_reason) message.finish = choice.finish_reason;
      take(message, "reasoning", choice?.delta.reasoning, chunk.drafted_reasoning);
      take(message, "content", choice?.delta.content, chunk.drafted);
      if (live.tokens) {
        const now = performance.now();
        first ??= { now, tokens: live.tokens };
        live.first = (first.now - begun) / 1000;
        live.perSecond = now > first.now ? ((live.tokens - first.tokens) * 1000) / (now - first.now) : 0;
      }
    }
    changed();
  }
  if (!done) throw new Error("The answer broke off: the server closed the connection.");
}

/** Add a text to a message, and which of its characters were drafted if the server says so. */
function take(message, kind, text, pieces = []) {
  if (!text) return;
  const marks = pieces.map(([piece, drafted]) => (drafted ? "1" : "0").repeat(piece.length)).join("");
  message[kind] += text;
  message.marks[kind] += marks.length === text.length ? marks : "0".repeat(text.length);
  message.live.tokens += pieces.length || 1;
  message.live.steps += pieces.filter(([, drafted]) => !drafted).length; // one token of each step is the model's own
}

/** What is known of a message's speed: the server's figures where it gave them, else what was seen from here. */
function figures({ usage = {}, live, draft }) {
  const tokens = usage.completion_tokens ?? live.tokens;
  return {
    tokens,
    perSecond: usage.tokens_per_second ?? live.perSecond,
    perStep: draft && (usage.tokens_per_step ?? (live.steps ? live.tokens / live.steps : 0)),
    share: draft && (usage.accepted_tokens ?? (live.steps ? live.tokens - live.steps : 0)) / tokens,
    first: usage.first_token_seconds ?? live.first,
    prompt: usage.prompt_tokens,
    cached: usage.prompt_tokens_details?.cached_tokens,
  };
}

function describe(message, job) {
  const { tokens, perSecond, perStep, share, first, prompt, cached } = figures(message);
  if (!tokens) return job?.note ?? (message.stopped ? "Stopped." : "");
  return [
    `${tokens} token${tokens === 1 ? "" : "s"}`,
    perSecond && `${perSecond.toFixed(1)} tokens/s`,
    perStep && `${perStep.toFixed(2)} tokens per step`,
    share && `${Math.round(100 * share)} % drafted`,
    !message.draft && "drafting off",
    !job && first && `first after ${first.toFixed(2)} s`,
    cached !== undefined && `${cached} of ${prompt} prompt tokens cached`,
    message.finish === "length" && "cut at the most tokens allowed",
    !job && !message.finish && !message.error && "stopped",
  ].filter(Boolean).join(" · ");
}

// --- What is seen ---------------------------------------------------------------------------------------------

const say = (text) => { $("status").textContent = text; }; // to who listens

function warn(text) {
  $("warning").textContent = text;
  $("warning").hidden = !text;
}

function open(chat) {
  current = chat;
  sessionStorage.setItem("mlx-redrafter/open", chat.id);
  const made = chat.messages.map(({ role, content }) => {
    const view = $(role).content.cloneNode(true).firstElementChild;
    if (role === "user") view.firstElementChild.textContent = content;
    return view;
  });
  $("log").replaceChildren(...(made.length ? made : [$("welcome").content.cloneNode(true)]));
  chat.messages.forEach(drawAnswer);
  draw();
  $("log").scrollTop = $("log").scrollHeight;
}

let soon = null;
function drawSoon(chat) { // at most once per frame, however fast the tokens come
  if (chat === current) soon ??= requestAnimationFrame(drawLast);
}

function drawAnswer(message, index) {
  if (message?.role !== "assistant") return;
  const log = $("log");
  const follow = log.scrollHeight - log.scrollTop - log.clientHeight < 60; // not if the reader has scrolled up
  const view = log.children[index];
  const last = index === current.messages.length - 1;
  const job = last ? jobs.get(current) : undefined;
  const thoughts = view.querySelector("details");
  const problem = view.querySelector(".error");
  const retry = view.querySelector("[data-do=retry]");
  thoughts.hidden = !message.reasoning;
  thoughts.firstElementChild.textContent = job && !message.content ? "Thinking …" : "Thoughts";
  render(thoughts.lastElementChild, message.reasoning, message.marks.reasoning);
  render(view.querySelector(":scope > .markdown"), message.content, message.marks.content);
  view.querySelector(".figures").textContent = describe(message, job);
  view.querySelector("[data-do=copy]").hidden = !message.content || Boolean(job);
  problem.hidden = !message.error;
  problem.textContent = message.error ?? "";
  retry.hidden = !last || Boolean(job);
  retry.textContent = message.error ? "Try again" : "Regenerate";
  if (follow) log.scrollTop = log.scrollHeight;
}

function drawLast() {
  soon = null;
  drawAnswer(current.messages.at(-1), current.messages.length - 1);
}

function draw() {
  drawLast();
  $("send").hidden = jobs.has(current);
  $("stop").hidden = !jobs.has(current);
  listChats();
  showSpeeds();
}

function listChats() {
  const focus = document.activeElement?.dataset.chat;
  const button = (properties) => element("button", { type: "button", ...properties });
  $("list").replaceChildren(...newestFirst().map((chat) => {
    const show = button({ textContent: title(chat), ariaCurrent: chat === current ? "true" : null });
    const remove = button({ textContent: "×", ariaLabel: `Delete “${title(chat)}”` });
    show.dataset.chat = chat.id;
    show.onclick = () => {
      open(chat);
      $("chats").hidePopover();
    };
    remove.onclick = () => deleteChat(chat);
    return element("li", {}, show, remove);
  }));
  document.querySelector(`[data-chat="${focus}"]`)?.focus();
}

function showSpeeds() {
  const { on, off } = settings.speeds[$("model").value] ?? {};
  const known = [on && `on ${on.toFixed(1)}`, off && `off ${off.toFixed(1)}`].filter(Boolean);
  const ratio = on && off ? ` · ${(on / off).toFixed(2)} ×` : "";
  $("compare").textContent = known.length ? `${known.join(" · ")} tokens/s${ratio}` : "";
}

// --- What people do -------------------------------------------------------------------------------------------

function send() {
  const content = $("input").value.trim();
  if (!content || jobs.has(current)) return;
  current.messages.push({ role: "user", content });
  $("input").value = "";
  fitInput();
  answer(current);
}

function retry() {
  current.messages.pop();
  answer(current);
  $("input").focus(); // the button that was pressed is gone
}

function fitInput() {
  $("input").style.height = "auto";
  $("input").style.height = `${$("input").scrollHeight + 2}px`;
}

async function copy(text, button) {
  const box = element("textarea", { value: text });
  try {
    await navigator.clipboard.writeText(text);
  } catch { // not over plain HTTP from another machine: the old way
    button.after(box);
    box.select();
    document.execCommand("copy");
    box.remove();
    button.focus();
  }
  button.textContent = "Copied";
  setTimeout(() => { button.textContent = "Copy"; }, 1500);
}

$("log").addEventListener("click", ({ target }) => {
  const index = [...$("log").children].indexOf(target.closest("article"));
  if (target.dataset.copy !== undefined) copy(target.dataset.copy, target);
  else if (target.dataset.do === "copy") copy(current.messages[index].content, target);
  else if (target.dataset.do === "retry") retry();
});
$("composer").addEventListener("submit", (event) => {
  event.preventDefault();
  send();
  $("input").focus();
});
$("input").addEventListener("keydown", (event) => {
  if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
  event.preventDefault();
  send();
});
$("input").addEventListener("input", fitInput);
$("stop").addEventListener("click", () => {
  jobs.get(current)?.stop.abort();
  $("input").focus();
});
document.addEventListener("keydown", (event) => {
  if (event.key === "Escape" && !document.querySelector("dialog[open], :popover-open")) jobs.get(current)?.stop.abort();
});
$("new").addEventListener("click", () => {
  open([...chats.values()].find(({ messages }) => !messages.length) ?? newChat());
  $("chats").hidePopover();
  $("input").focus();
});
$("open-settings").addEventListener("click", () => $("settings").showModal());
$("model").addEventListener("change", () => {
  settings.model = $("model").value;
  keepSettings();
  showSpeeds();
});
$("theme").addEventListener("click", () => {
  const now = settings.theme ?? (matchMedia("(prefers-color-scheme: dark)").matches ? "dark" : "light");
  document.documentElement.dataset.theme = settings.theme = now === "dark" ? "light" : "dark";
  keepSettings();
});
for (const name of ["draft", "colour"]) {
  $(name).checked = settings[name];
  $(name).addEventListener("change", () => {
    settings[name] = $(name).checked;
    document.body.classList.toggle("show-drafted", settings.colour);
    keepSettings();
  });
}
for (const field of document.querySelectorAll("#settings [name]")) {
  field.value = settings[field.name] ?? "";
  field.addEventListener("change", () => {
    if (!field.validity.valid) return; // the browser says why when the dialog is to be closed
    settings[field.name] = field.value;
    keepSettings();
  });
}
for (const dialog of document.querySelectorAll("dialog")) {
  dialog.querySelector("form").addEventListener("submit", (event) => {
    event.preventDefault();
    dialog.close("given");
  });
  dialog.querySelector("[value=cancel]")?.addEventListener("click", () => dialog.close(""));
}
addEventListener("pagehide", () => [...jobs.keys()].forEach(keepChat));

if (settings.theme) document.documentElement.dataset.theme = settings.theme;
document.body.classList.toggle("show-drafted", settings.colour);
open(chats.get(sessionStorage.getItem("mlx-redrafter/open")) ?? latest());
loadModels().catch((error) => warn(error.message)); // and again with the first question
