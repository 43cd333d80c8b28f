// The sampling controls, as fields of a request. What is left empty is left to the server's defaults.

import { byId } from "./dom.js";

const NUMBERS = [
  "temperature",
  "max_tokens",
  "top_p",
  "top_k",
  "min_p",
  "seed",
  "presence_penalty",
  "frequency_penalty",
  "repetition_penalty",
];

/** Whether every control holds something possible; points the first one out that does not. */
export function isValid() {
  const form = byId("settings");
  if (form.checkValidity()) return true;
  byId("settings-box").open = true;
  form.reportValidity();
  return false;
}

/** The fields of a request body that both routes share. */
export function samplingFields() {
  const fields = {};
  for (const name of NUMBERS) {
    const value = byId(name).value.trim();
    if (value !== "") fields[name] = Number(value);
  }
  const stop = byId("stop_strings").value.split("\n").filter((line) => line !== "");
  if (stop.length) fields.stop = stop.map((line) => line.replaceAll("\\n", "\n").replaceAll("\\t", "\t"));
  return fields;
}

/** How many alternatives to show of each token; null when its colours are not asked for. */
export const numAlternatives = () => (byId("logprobs").checked ? Number(byId("alternatives").value) : null);

/** The system prompt, or an empty string. */
export const systemPrompt = () => byId("system").value.trim();

/** Show the controls of one mode. */
export function showMode(mode) {
  for (const field of document.querySelectorAll("[data-mode]")) field.hidden = field.dataset.mode !== mode;
}
