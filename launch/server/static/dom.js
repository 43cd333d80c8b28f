// Makes elements out of text. Nothing on this page turns a string into markup; the server's policy forbids it, too.

/** An element with properties, `dataset` and `aria` among them, and children (strings become text). */
export function element(name, properties = {}, ...children) {
  const made = document.createElement(name);
  for (const [key, value] of Object.entries(properties)) {
    if (key === "dataset") Object.assign(made.dataset, value);
    else if (key === "aria") for (const [each, text] of Object.entries(value)) made.setAttribute(`aria-${each}`, text);
    else if (key === "role") made.setAttribute("role", value);
    else made[key] = value;
  }
  made.append(...children.filter((child) => child !== null));
  return made;
}

/** The element with this id. */
export const byId = (id) => document.getElementById(id);

/** A button that calls `action`. */
export function button(label, action, properties = {}) {
  const made = element("button", { type: "button", className: "quiet", ...properties }, label);
  made.addEventListener("click", action);
  return made;
}

/** A button that copies what `text` gives, and says so for a moment. */
export function copyButton(text) {
  const made = button("Copy", async () => {
    try {
      await navigator.clipboard.writeText(text());
      made.textContent = "Copied";
    } catch {
      made.textContent = "Not allowed"; // a page without TLS on another host has no clipboard
    }
    setTimeout(() => (made.textContent = "Copy"), 1500);
  });
  return made;
}

/** A duration in seconds as a person reads it. */
export function duration(seconds) {
  if (seconds === null || seconds === undefined) return "–";
  if (seconds < 0.01) return `${(seconds * 1000).toFixed(1)} ms`;
  if (seconds < 1) return `${Math.round(seconds * 1000)} ms`;
  if (seconds < 100) return `${seconds.toFixed(seconds < 10 ? 2 : 1)} s`;
  return `${Math.round(seconds / 60)} min`;
}

/** A count with separators. */
export const count = (number) => number.toLocaleString("en-US");

const COMPACT = new Intl.NumberFormat("en-US", { notation: "compact", maximumSignificantDigits: 3 });
/** A count in few characters: 65.5k. */
export const short = (number) => (number < 10000 ? count(number) : COMPACT.format(number).toLowerCase());

/** `1 block`, `2 blocks`. */
export const plural = (number, noun) => `${count(number)} ${noun}${number === 1 ? "" : "s"}`;
