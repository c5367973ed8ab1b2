// Talks to the server. Actions leave one after the other, each with an id of its own, and are sent again until the
// server has written them down; what is not sent yet outlives a reload of the page.

const PAUSES = [500, 1000, 2000, 4000, 8000];

export class Refused extends Error {
  constructor(status, faults) {
    super(faults.map((fault) => [fault.where, fault.found, fault.expected && `expected ${fault.expected}`, fault.fix]
      .filter(Boolean).join("; ")).join("\n"));
    this.status = status;
    this.key = faults[0] ? faults[0].where : "";
  }
}

export async function call(path, body, csrf) {
  const headers = { Accept: "application/json" };
  if (body !== undefined) headers["Content-Type"] = "application/json";
  if (csrf) headers["X-CSRF-Token"] = csrf;
  const method = body === undefined ? "GET" : "POST";
  // keepalive: what is on its way when the page closes still arrives.
  const options = { method, headers, credentials: "same-origin", cache: "no-store", keepalive: true };
  if (body !== undefined) options.body = JSON.stringify(body);
  const answer = await fetch(path, options);
  let found = null;
  try {
    found = await answer.json();
  } catch (error) {
    if (answer.ok) throw error; // cut off on the way: asked again
  }
  if (answer.ok) return found;
  const faults = found && found.error ? found.error.faults : [{ found: `the server answered ${answer.status}` }];
  throw new Refused(answer.status, faults);
}

export function freshId() {
  const bytes = crypto.getRandomValues(new Uint8Array(16));
  return [...bytes].map((byte) => byte.toString(16).padStart(2, "0")).join("");
}

const wait = (milliseconds) => new Promise((resolve) => setTimeout(resolve, milliseconds));
const isLost = (error) => !(error instanceof Refused) || error.status >= 500 || [408, 429].includes(error.status);
const isStranger = (error) => error instanceof Refused && (error.status === 401 || error.key === "X-CSRF-Token");

export class Wire {
  // told: {saved(), saving(), retrying(), recorded(answer), refused(error), stranger()}
  constructor({ project, name, csrf }, told) {
    this.name = name;
    this.csrf = csrf;
    this.told = told;
    this.slot = `rlhf-label:${project}:${name}`;
    this.queue = JSON.parse(sessionStorage.getItem(this.slot) || "[]");
    this.running = null;
    this.away = false; // the server has not answered the last time
  }

  get pending() {
    return this.queue.length;
  }

  keep() {
    sessionStorage.setItem(this.slot, JSON.stringify(this.queue));
  }

  send(task, action) {
    this.queue.push({ task, client: freshId(), action });
    this.keep();
    return this.flush();
  }

  // Resolves when every action so far is written down or refused.
  flush() {
    if (!this.running) this.running = this.pump().finally(() => (this.running = null));
    return this.running;
  }

  async pump() {
    while (this.queue.length) {
      this.told.saving();
      const event = this.queue[0];
      let answer = null;
      let refusal = null;
      try {
        answer = await this.asked("/api/events", event);
      } catch (error) {
        refusal = error;
      }
      if (refusal && isStranger(refusal)) return; // it stays in the queue until somebody has signed in again
      this.queue.shift();
      this.keep();
      if (refusal) {
        this.queue.length = 0; // what followed was meant for a state that is not there
        this.keep();
        this.told.refused(refusal);
      } else {
        this.told.recorded(answer);
      }
    }
    this.told.saved();
  }

  // The answer, however long it takes: tries again while the server is away, signs in again where it has forgotten us.
  async asked(path, body) {
    for (let attempt = 0; ; attempt++) {
      try {
        const answer = await call(path, body, this.csrf);
        this.away = false;
        return answer;
      } catch (error) {
        if (isStranger(error)) {
          if (!(await this.rejoin(attempt))) throw error;
        } else if (!isLost(error)) throw error;
        else {
          this.away = true;
          this.told.retrying();
          await wait(PAUSES[Math.min(attempt, PAUSES.length - 1)]);
        }
      }
    }
  }

  async rejoin(attempt) {
    try {
      if (attempt > 0) await wait(PAUSES[1]);
      const body = { name: this.name, token: sessionStorage.getItem("rlhf-label:token") };
      this.csrf = (await call("/api/session", body)).csrf;
      return true;
    } catch (error) {
      if (isLost(error)) return true;
      this.told.stranger();
      return false;
    }
  }
}
