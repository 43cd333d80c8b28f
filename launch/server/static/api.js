// Talks to the server this page came from: the key, errors, and server-sent events. Knows no element of the page.

const KEY = "nanoengine.key";

let key = stored();
let askForKey = async () => null;
let asking = null;

/** An error as the server tells it. */
export class ApiError extends Error {
  constructor(status, message, code) {
    super(message);
    this.status = status;
    this.code = code;
  }
}

function stored() {
  try {
    return sessionStorage.getItem(KEY) ?? "";
  } catch {
    return "";
  }
}

/** Use a key from now on, for as long as this tab is open. */
export function setKey(value) {
  key = value;
  try {
    sessionStorage.setItem(KEY, value);
  } catch {
    // then it lasts as long as the page
  }
}

/** `ask(wasWrong)` resolves to a key, or to null when nobody gives one. */
export function onKeyWanted(ask) {
  askForKey = ask;
}

/** A header is a string of bytes: UTF-8, as the server reads it. */
const asBytes = (text) => String.fromCharCode(...new TextEncoder().encode(text));

/** Several requests that lack a key ask for it once. */
function newKey() {
  asking ??= askForKey(key !== "").finally(() => (asking = null));
  return asking;
}

/**
 * The response to a request, which is 2xx.
 *
 * Throws ApiError, also when the server cannot be reached (status 0), and AbortError. `ask: false` takes a 401 as it is.
 */
export async function request(path, { body, signal, ask = true } = {}) {
  for (;;) {
    const used = key;
    const headers = used ? { Authorization: `Bearer ${asBytes(used)}` } : {};
    const options = { headers, signal, cache: "no-store" };
    if (body !== undefined) {
      options.method = "POST";
      options.body = JSON.stringify(body);
      headers["Content-Type"] = "application/json";
    }
    let response;
    try {
      // Relative to the page, so that it works behind a proxy that serves it below a path.
      response = await fetch(new URL(path, document.baseURI), options);
    } catch (error) {
      if (error.name === "AbortError") throw error;
      throw new ApiError(0, "The server cannot be reached.", "unreachable");
    }
    if (response.ok) return response;
    if (response.status === 401 && ask) {
      if (key !== used) continue; // somebody else was given one meanwhile
      const given = await newKey();
      if (given !== null) {
        setKey(given);
        continue;
      }
    }
    throw await asError(response);
  }
}

async function asError(response) {
  try {
    const { error } = await response.json();
    return new ApiError(response.status, error.message, error.code);
  } catch {
    return new ApiError(response.status, `The server answered ${response.status}.`, null);
  }
}

/** The JSON of each event until `[DONE]`. An event that is an error is thrown as ApiError. */
export async function* events(response) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let buffered = "";
  try {
    for (;;) {
      const { value, done } = await reader.read();
      if (done) throw new ApiError(0, "The stream broke off.", "broken_off");
      buffered = (buffered + value).replaceAll("\r\n", "\n");
      const pieces = buffered.split("\n\n");
      buffered = pieces.pop();
      for (const piece of pieces) {
        const data = dataOf(piece);
        if (data === "[DONE]") return;
        if (data === "") continue; // a comment that keeps the connection alive
        const event = JSON.parse(data);
        if (event.error) throw new ApiError(200, event.error.message, event.error.code);
        yield event;
      }
    }
  } finally {
    reader.cancel().catch(() => {});
  }
}

function dataOf(piece) {
  return piece
    .split("\n")
    .filter((line) => line.startsWith("data:"))
    .map((line) => line.slice(5).trimStart())
    .join("\n");
}
