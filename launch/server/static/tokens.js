// Shows an answer token by token, coloured by probability, with the alternatives of the one that is pointed at.
//
// One stop for the tab key: arrow keys go from token to token, and Escape puts the alternatives away.

import { byId, element } from "./dom.js";

// Lowest probability of each class; what is below the last is the class after it.
const CLASSES = [0.9, 0.6, 0.3, 0.1];

/** Tokens of a chat chunk (`logprobs.content`) in the form that `TokenView` takes. */
export function chatTokens(logprobs) {
  return (logprobs?.content ?? []).map((each) => ({
    text: each.token,
    bytes: each.bytes,
    logprob: each.logprob,
    alternatives: each.top_logprobs.map(({ token, logprob }) => ({ text: token, logprob })),
  }));
}

/** Likewise of a completion chunk, which has parallel lists and no bytes. */
export function completionTokens(logprobs) {
  return (logprobs?.tokens ?? []).map((text, i) => ({
    text,
    bytes: null,
    logprob: logprobs.token_logprobs[i],
    alternatives: Object.entries(logprobs.top_logprobs[i] ?? {})
      .map(([other, logprob]) => ({ text: other, logprob }))
      .sort((a, b) => b.logprob - a.logprob),
  }));
}

/** The tokens of one answer. */
export class TokenView {
  constructor() {
    this.element = element("div", { className: "tokens", role: "group", tabIndex: 0 });
    this.element.setAttribute("aria-label", "Tokens by probability; arrow keys move");
    this.tokens = [];
    this.current = -1;
    // A character may be spread over tokens: the bytes wait until it is whole, and the last token shows it.
    this.decoder = new TextDecoder();
    this.element.addEventListener("pointerover", (event) => this.point(event.target));
    this.element.addEventListener("pointerleave", () => this.leave());
    this.element.addEventListener("focus", () => this.tokens.length && this.select(Math.max(0, this.current)));
    this.element.addEventListener("blur", () => this.leave());
    this.element.addEventListener("keydown", (event) => this.key(event));
  }

  add(tokens) {
    for (const token of tokens) {
      const text = token.bytes ? this.decoder.decode(new Uint8Array(token.bytes), { stream: true }) : token.text;
      const probability = Math.exp(token.logprob);
      const rank = CLASSES.findIndex((least) => probability >= least);
      const made = element("span", { className: `token p${rank < 0 ? CLASSES.length : rank}` }, text || "\u200b");
      if (/^<[|\/]?\w.*>$/.test(text)) made.classList.add("special");
      made.dataset.number = this.tokens.length;
      this.tokens.push(token);
      this.element.append(made);
    }
  }

  point(target) {
    if (target.dataset?.number !== undefined) this.select(Number(target.dataset.number));
  }

  key(event) {
    const moves = { ArrowRight: 1, ArrowLeft: -1, Home: -Infinity, End: Infinity };
    if (event.key === "Escape" && !byId("token-tip").hidden) {
      this.leave();
      event.stopPropagation();
    } else if (event.key in moves && this.tokens.length) {
      event.preventDefault();
      this.select(Math.min(this.tokens.length - 1, Math.max(0, this.current + moves[event.key])));
    }
  }

  select(number) {
    this.element.querySelector(".current")?.classList.remove("current");
    this.current = number;
    const token = this.element.children[number];
    token.classList.add("current");
    const tip = byId("token-tip");
    tip.replaceChildren(...description(this.tokens[number]));
    tip.hidden = false;
    this.element.setAttribute("aria-describedby", "token-tip");
    place(tip, token.getClientRects()[0] ?? token.getBoundingClientRect());
  }

  leave() {
    this.element.querySelector(".current")?.classList.remove("current");
    this.element.removeAttribute("aria-describedby");
    byId("token-tip").hidden = true;
  }
}

/** What the colours mean. */
export function tokenKey() {
  const classes = [...CLASSES.map((least) => `≥ ${100 * least} %`), "less"];
  return element("p", { className: "token-key hint" }, ...classes.map((text, i) => element("span", { className: `token p${i}` }, text)));
}

function description(token) {
  const rows = token.alternatives.some((each) => each.text === token.text && each.logprob === token.logprob)
    ? token.alternatives
    : [...token.alternatives, token];
  return [
    element("p", {}, element("code", {}, visible(token.text)), ` ${percent(token.logprob)}`, element("span", { className: "hint" }, ` logprob ${token.logprob.toFixed(3).replace("-", "−")}`)),
    element("ol", {}, ...rows.map((each) => alternative(each, each.logprob === token.logprob && each.text === token.text))),
  ];
}

function alternative(each, isChosen) {
  const bar = element("i", { className: "bar-part" });
  bar.style.setProperty("--share", Math.exp(each.logprob).toFixed(4));
  const name = element("code", {}, visible(each.text));
  return element("li", { className: isChosen ? "chosen" : "" }, name, bar, element("span", {}, percent(each.logprob)));
}

const percent = (logprob) => {
  const share = 100 * Math.exp(logprob);
  return share >= 99.95 ? "100 %" : share >= 0.1 ? `${share.toFixed(1)} %` : "< 0.1 %";
};

/** White space that can be seen. */
const visible = (text) => text.replaceAll(" ", "·").replaceAll("\n", "↵").replaceAll("\t", "⇥") || "∅";

function place(tip, at) {
  const { width, height } = tip.getBoundingClientRect();
  const left = Math.min(Math.max(8, at.left), innerWidth - width - 8);
  const below = at.bottom + 6;
  tip.style.left = `${left}px`;
  tip.style.top = `${below + height <= innerHeight - 8 ? below : at.top - height - 6}px`;
}
