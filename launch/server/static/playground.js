// The playground: a conversation or single completions, one running at a time.

import { Answer } from "./answer.js";
import { ApiError, events, request } from "./api.js";
import { button, byId, element } from "./dom.js";
import { isValid, numAlternatives, samplingFields, showMode, systemPrompt } from "./settings.js";
import { chatTokens, completionTokens } from "./tokens.js";

/** Ids of this page's own requests, so that the engine's view can point them out. */
export const ownRequests = new Set();

// Things that the embedded demo model knows.
const SUGGESTIONS = {
  chat: ["中国的首都是哪里？", "What is 17 + 25?", "Tell me a story about Lily the bear, the garden and the flute."],
  completion: ["中国的首都是", "What is 17 + 25? Answer:", "The capital of France is"],
};
const WORDS = {
  chat: { label: "Message", placeholder: "Message the model", empty: "Say something to the model.", clear: "New chat" },
  completion: { label: "Prompt", placeholder: "Text to continue", empty: "Give the model a text to continue.", clear: "Clear" },
};
// This close to the end, a growing answer keeps being scrolled to.
const NEAR_END = 80;

let reportFailure = () => {};
let mode = "chat";
let model = null;
let running = null; // the AbortController of the answer that grows
let messages = []; // the conversation so far

export function setModel(name) {
  model = name;
  suggest();
}

/** Begin. `onFailure` is called when the server cannot be reached or does not serve. */
export function startPlayground(onFailure) {
  reportFailure = onFailure;
  byId("composer").addEventListener("submit", (event) => {
    event.preventDefault();
    send();
  });
  byId("composer-text").addEventListener("keydown", (event) => {
    // An input method uses Enter to pick a word.
    if (event.key === "Enter" && !event.shiftKey && !event.isComposing) {
      event.preventDefault();
      send();
    }
  });
  byId("composer-text").addEventListener("input", fitComposer);
  addEventListener("keydown", (event) => {
    if (event.key === "Escape" && running && !byId("key-dialog").open) stop();
  });
  byId("stop").addEventListener("click", stop);
  byId("clear").addEventListener("click", clear);
  byId("transcript").addEventListener("grown", followEnd);
  for (const radio of document.querySelectorAll("input[name=mode]")) {
    radio.addEventListener("change", () => setMode(radio.value));
  }
  // A reload may have kept the other mode.
  setMode(document.querySelector("input[name=mode]:checked").value);
}

function setMode(wanted) {
  mode = wanted;
  const words = WORDS[mode];
  byId("chat-log").hidden = mode !== "chat";
  byId("completion-log").hidden = mode !== "completion";
  byId("composer-label").textContent = words.label;
  byId("composer-text").placeholder = words.placeholder;
  byId("empty-text").textContent = words.empty;
  byId("clear").textContent = words.clear;
  showMode(mode);
  suggest();
}

const log = () => byId(`${mode}-log`);

function suggest() {
  byId("empty").hidden = log().childElementCount > 0;
  const shown = model === "demo" ? SUGGESTIONS[mode] : [];
  const take = (text) => {
    byId("composer-text").value = text;
    fitComposer();
    byId("composer-text").focus();
  };
  byId("suggestions").replaceChildren(
    ...shown.map((text) => element("li", {}, button(text, () => take(text), { className: "quiet suggestion" }))),
  );
}

function clear() {
  stop();
  log().replaceChildren();
  if (mode === "chat") messages = [];
  suggest();
  byId("composer-text").focus();
}

function fitComposer() {
  const text = byId("composer-text");
  text.style.height = "auto";
  text.style.height = `${Math.min(text.scrollHeight + 2, innerHeight / 3)}px`;
}

function followEnd() {
  const transcript = byId("transcript");
  const missing = transcript.scrollHeight - transcript.scrollTop - transcript.clientHeight;
  if (missing < NEAR_END + transcript.clientHeight / 3) transcript.scrollTop = transcript.scrollHeight;
}

// -- sending ----------------------------------------------------------------------------------------------------

function send() {
  const text = byId("composer-text").value;
  if (running || !text.trim() || !isValid()) return;
  if (mode === "chat") {
    byId("composer-text").value = "";
    fitComposer();
    messages.push({ role: "user", content: text });
    log().append(element("article", { className: "message question", aria: { label: "You" } }, element("div", { className: "body plain" }, text)));
    answerChat();
  } else {
    complete(text);
  }
}

async function answerChat() {
  const asked = messages;
  const system = systemPrompt();
  const alternatives = numAlternatives();
  const answer = new Answer({ withTokens: alternatives !== null });
  const shown = system ? [{ role: "system", content: system }, ...asked] : asked;
  const body = { messages: shown, ...(alternatives === null ? {} : { logprobs: true, top_logprobs: alternatives }) };
  const isWhole = await generate("v1/chat/completions", body, answer, (choice) => ({
    text: choice.delta.content ?? "",
    reasoning: choice.delta.reasoning_content ?? "",
    tokens: chatTokens(choice.logprobs),
  }));
  if (messages !== asked) return; // a new chat was begun meanwhile
  if (answer.text || isWhole) messages.push({ role: "assistant", content: answer.text });
  offerAgain(answer, asked);
}

/** The last answer can be had once more. */
function offerAgain(answer, asked) {
  for (const old of log().querySelectorAll(".again")) old.remove();
  const again = () => {
    if (running || messages !== asked) return;
    if (messages.at(-1).role === "assistant") messages.pop();
    answer.element.remove();
    answerChat();
  };
  answer.actions.append(button("Again", again, { className: "quiet again", title: "Answer once more" }));
}

async function complete(prompt) {
  const alternatives = numAlternatives();
  const answer = new Answer({ prompt, withTokens: alternatives !== null });
  const body = { prompt, ...(alternatives === null ? {} : { logprobs: alternatives }) };
  await generate("v1/completions", body, answer, (choice) => ({
    text: choice.text,
    tokens: completionTokens(choice.logprobs),
  }));
  const goOn = () => {
    byId("composer-text").value = prompt + answer.text;
    fitComposer();
    byId("composer-text").focus();
  };
  answer.actions.append(button("Use as prompt", goOn));
}

/** Stream an answer into its place; says whether it came to its own end. */
async function generate(path, body, answer, read) {
  const control = (running = new AbortController());
  log().append(answer.element);
  suggest();
  setRunning(true);
  followEnd();
  let reason = "ended";
  let usage = null;
  try {
    const asked = { model, stream: true, stream_options: { include_usage: true }, ...samplingFields(), ...body };
    const response = await request(path, { body: asked, signal: control.signal });
    for await (const chunk of events(response)) {
      ownRequests.add(chunk.id);
      usage = chunk.usage ?? usage;
      const choice = chunk.choices[0];
      if (!choice) continue;
      answer.add(read(choice));
      reason = choice.finish_reason ?? reason;
    }
    answer.end(reason, usage);
    announce(`Answer complete, ${usage?.completion_tokens ?? 0} tokens.`);
    return true;
  } catch (error) {
    if (error.name === "AbortError") {
      answer.end("stopped", usage);
      announce("Stopped.");
    } else {
      answer.fail(error instanceof ApiError ? error.message : `This page failed: ${error.message}`);
      if (!(error instanceof ApiError)) console.error(error);
      else if (error.status === 0 || error.status === 503) reportFailure();
    }
    return false;
  } finally {
    if (running === control) {
      running = null;
      setRunning(false);
    }
    followEnd();
  }
}

function stop() {
  running?.abort();
}

function setRunning(isRunning) {
  const hadFocus = document.activeElement === byId("stop");
  byId("stop").hidden = !isRunning;
  byId("send").hidden = isRunning;
  byId("transcript").setAttribute("aria-busy", String(isRunning));
  if (!isRunning && hadFocus) byId("composer-text").focus();
}

function announce(text) {
  byId("announcer").textContent = text;
}
