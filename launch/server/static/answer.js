// One answer of the model while it grows: its text as Markdown or plain, its tokens, what it took, and how it ended.

import { copyButton, count, duration, element, plural } from "./dom.js";
import { renderMarkdown } from "./markdown.js";
import { TokenView, tokenKey } from "./tokens.js";

/** An answer. `prompt` is shown in front of the text of a completion; a chat's answer is Markdown. */
export class Answer {
  constructor({ prompt = null, withTokens = false } = {}) {
    this.prompt = prompt;
    this.text = "";
    this.reasoning = "";
    this.tokens = withTokens ? new TokenView() : null;
    this.began = performance.now();
    this.first = this.last = null;
    this.frame = 0;
    this.body = element("div", { className: prompt === null ? "body markdown" : "body plain" });
    this.thoughts = element("div", { className: "body plain" });
    this.thinking = element("details", { className: "thinking", hidden: true }, element("summary", {}, "Reasoning"), this.thoughts);
    this.actions = element("div", { className: "actions" });
    this.stats = element("p", { className: "stats" });
    this.element = element(
      "article",
      { className: "message answer", aria: { label: prompt === null ? "Answer" : "Completion", busy: "true" } },
      this.thinking,
      this.body,
      element("footer", {}, this.stats, this.actions),
    );
    this.element.classList.add("growing");
    if (prompt !== null) this.body.append(element("span", { className: "given" }, prompt), element("span", {}));
    this.key = tokenKey();
    if (this.tokens) this.body.before(this.tokens.element, this.key);
    this.showTokens(withTokens);
  }

  /** Take in what a chunk brought. */
  add({ text = "", reasoning = "", tokens = [] }) {
    if (text || reasoning || tokens.length) {
      this.last = performance.now();
      this.first ??= this.last;
    }
    this.text += text;
    this.reasoning += reasoning;
    this.tokens?.add(tokens);
    this.frame ||= requestAnimationFrame(() => this.draw());
  }

  draw() {
    this.frame = 0;
    if (this.prompt === null) renderMarkdown(this.body, this.text);
    else this.body.lastChild.textContent = this.text;
    this.thinking.hidden = !this.reasoning;
    this.thoughts.textContent = this.reasoning;
    this.element.dispatchEvent(new CustomEvent("grown", { bubbles: true }));
  }

  /** The answer is complete, or was stopped: `reason` says which; `usage` counts, where the server told. */
  end(reason, usage = null) {
    cancelAnimationFrame(this.frame);
    this.settle();
    const parts = [];
    if (usage) {
      const cached = usage.prompt_tokens_details?.cached_tokens ?? 0;
      parts.push(`${plural(usage.prompt_tokens, "prompt token")}${cached ? ` (${count(cached)} cached)` : ""}`);
      parts.push(plural(usage.completion_tokens, "token"));
    }
    if (this.first !== null) parts.push(`first after ${duration((this.first - this.began) / 1000)}`);
    const others = (usage?.completion_tokens ?? 0) - 1;
    if (others > 0) parts.push(`then ${duration((this.last - this.first) / 1000 / others)} each`);
    parts.push(reason);
    this.stats.textContent = parts.join(" · ");
    this.actions.append(copyButton(() => this.text));
    if (this.tokens) this.actions.append(this.viewButton());
  }

  /** It failed; what there is of it stays. */
  fail(message) {
    this.settle();
    this.element.lastChild.before(element("p", { className: "error", role: "alert" }, message));
  }

  settle() {
    this.draw();
    this.element.classList.remove("growing");
    this.element.setAttribute("aria-busy", "false");
  }

  viewButton() {
    const made = element("button", { type: "button", className: "quiet view-tokens", aria: { pressed: "true" } }, "Tokens");
    made.addEventListener("click", () => {
      const shown = this.tokens.element.hidden;
      this.showTokens(shown);
      made.setAttribute("aria-pressed", String(shown));
    });
    return made;
  }

  showTokens(shown) {
    if (this.tokens) this.tokens.element.hidden = this.key.hidden = !shown;
    this.body.hidden = Boolean(this.tokens) && shown;
  }
}
