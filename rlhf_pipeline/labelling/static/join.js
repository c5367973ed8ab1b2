// The first page: who is labelling?
import { call } from "./wire.js";

const form = document.getElementById("join");
const name = form.elements.name;
const token = form.elements.token;
const fault = document.getElementById("fault");

// The token of the printed address stands behind its # and so reaches no log; it leaves the address bar at once.
const given = new URLSearchParams(location.hash.slice(1)).get("token");
if (given) {
  sessionStorage.setItem("rlhf-label:token", given);
  history.replaceState(null, "", location.pathname);
}
const known = sessionStorage.getItem("rlhf-label:token");
if (token && known) {
  token.value = known;
  document.getElementById("token-row").hidden = true;
}
name.value = localStorage.getItem("rlhf-label:name") || "";

form.addEventListener("submit", async (event) => {
  event.preventDefault();
  fault.textContent = "";
  const words = token ? token.value.trim() : null;
  try {
    const joined = await call("/api/session", { name: name.value, token: words });
    localStorage.setItem("rlhf-label:name", joined.name);
    if (words) sessionStorage.setItem("rlhf-label:token", words);
    location.reload();
  } catch (error) {
    fault.textContent = error.status ? error.message : "The server does not answer. Is rlhf label still running?";
    if (error.key === "token" && token) {
      document.getElementById("token-row").hidden = false;
      token.focus();
    } else name.focus();
  }
});
