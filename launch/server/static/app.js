// Puts the page together: the key, the server's state in the bar, and which view is shown.

import { ApiError, onKeyWanted, request, setKey } from "./api.js";
import { byId } from "./dom.js";
import { startEngineView } from "./engine.js";
import { setModel, startPlayground } from "./playground.js";

const RETRY_MS = 1000;
// What the bar shows of a server that answers and does not serve.
const NOT_SERVING = {
  loading: ["wait", "loading"],
  recovering: ["wait", "recovering"],
  draining: ["wait", "shutting down"],
  engine_dead: ["bad", "engine failed"],
};
const pause = (ms) => new Promise((resolve) => setTimeout(resolve, ms));

function setStatus(state, text) {
  const status = byId("status");
  if (status.textContent === text) return;
  status.dataset.state = state;
  status.textContent = text;
}

// -- the key ----------------------------------------------------------------------------------------------------

function askForKey(wasWrong) {
  const dialog = byId("key-dialog");
  const input = byId("key-input");
  byId("key-wrong").hidden = !wasWrong;
  byId("key-button").hidden = false;
  setStatus("wait", "key wanted");
  input.value = "";
  dialog.returnValue = "";
  dialog.showModal();
  return new Promise((resolve) => {
    dialog.addEventListener("close", () => {
      resolve(dialog.returnValue === "use" ? input.value.trim() : null);
      input.value = "";
    }, { once: true });
  });
}

function startKeyDialog() {
  const dialog = byId("key-dialog");
  onKeyWanted(async (wasWrong) => {
    const given = await askForKey(wasWrong);
    if (given !== null) setTimeout(connect); // once the request that asked has taken it
    return given;
  });
  byId("key-form").addEventListener("submit", (event) => {
    event.preventDefault();
    dialog.close("use");
  });
  byId("key-cancel").addEventListener("click", () => dialog.close(""));
  byId("key-button").addEventListener("click", async () => {
    const given = await askForKey(false);
    if (given !== null) setKey(given);
    connect();
  });
}

// -- the server -------------------------------------------------------------------------------------------------

let connecting = 0;

/** Ask until the server is there and ready. A later call takes over. */
async function connect() {
  const turn = (connecting += 1);
  while (turn === connecting) {
    try {
      const models = await (await request("v1/models")).json();
      const { id, max_model_len } = models.data[0];
      byId("model").textContent = id;
      byId("model").title = `The model that is served; up to ${max_model_len} tokens`;
      document.title = `${id} · nanoengine`;
      setModel(id);
      await request("readyz");
      setStatus("good", "ready");
      return;
    } catch (error) {
      if (!(error instanceof ApiError)) throw error;
      if (error.status === 401) return setStatus("bad", "key wanted");
      if (error.status === 503) setStatus(...(NOT_SERVING[error.code] ?? ["wait", "not serving"]));
      else setStatus("bad", error.status === 0 ? "unreachable" : `error ${error.status}`);
    }
    await pause(RETRY_MS);
  }
}

/** Something failed that may be the server's end. */
function noticeFailure() {
  if (byId("status").dataset.state === "good") connect();
}

// -- views on a narrow window -----------------------------------------------------------------------------------

function startViews() {
  for (const choice of document.querySelectorAll("[data-show]")) {
    choice.addEventListener("click", () => {
      document.body.dataset.view = choice.dataset.show;
      for (const each of document.querySelectorAll("[data-show]")) {
        each.setAttribute("aria-pressed", String(each === choice));
      }
    });
  }
  // The controls stand open where there is room beside the conversation.
  const wide = matchMedia("(min-width: 900px)");
  const fit = () => (byId("settings-box").open = wide.matches);
  wide.addEventListener("change", fit);
  fit();
}

startViews();
startKeyDialog();
startPlayground(noticeFailure);
connect();
// What the engine's view notices while it asks is the server's state, too.
startEngineView((error) => error !== null && noticeFailure());
// Where there is a keyboard; elsewhere one would pop up.
if (matchMedia("(min-width: 900px)").matches) byId("composer-text").focus({ preventScroll: true });
