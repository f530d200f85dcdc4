"use strict";

const $ = (id) => document.getElementById(id);
let signedInWith = sessionStorage.getItem("token");
let pictures = []; // addresses of the thumbnails that are shown

/** Make an element. Text from the run or the user is always set as text, never as HTML. */
function element(tag, properties = {}, ...children) {
  const made = Object.assign(document.createElement(tag), properties);
  made.append(...children);
  return made;
}

async function call(path, options = {}) {
  const headers = signedInWith ? { Authorization: `Bearer ${signedInWith}` } : {};
  let response;
  try {
    response = await fetch(path, { ...options, headers });
  } catch {
    throw new Error("The service does not answer. Is it still running?");
  }
  const body = await response.json().catch(() => ({}));
  if (response.status === 401) {
    $("content").hidden = true;
    $("sign-in").hidden = false;
    $("token").focus();
  }
  if (!response.ok && !body.predictions) throw new Error(body.error || `The service answered ${response.status}.`);
  return body;
}

const percent = (value) => (value > 0.9995 && value < 1 ? "> 99.9 %" : `${(100 * value).toFixed(1)} %`);
const count = (number, what) => `${number.toLocaleString("en")} ${what}${number === 1 ? "" : what.endsWith("s") ? "es" : "s"}`;

// Asking

let question = 0; // answers to an older question are not shown
let atOnce = 1; // photos of one request; the service says how many it takes

async function ask(files) {
  if (!files.length) return;
  const own = ++question;
  $("ask-error").textContent = "";
  pictures.forEach(URL.revokeObjectURL);
  pictures = [];
  $("answers").replaceChildren();
  for (let start = 0; start < files.length; start += atOnce) {
    $("asked").textContent = `Classifying ${count(files.length, "photo")} …`;
    const some = files.slice(start, start + atOnce);
    const body = new FormData();
    some.forEach((file) => body.append("files", file));
    try {
      const found = await call("predict?top=3", { method: "POST", body });
      if (own !== question) return;
      found.predictions.forEach((answer, index) => $("answers").append(card(some[index], answer)));
    } catch (error) {
      if (own !== question) return;
      $("ask-error").textContent = error.message;
      break;
    }
  }
  $("asked").textContent = `${count($("answers").querySelectorAll(".best").length, "photo")} classified`;
}

function card(file, answer) {
  const about = element("div", { className: "about" });
  const item = element("li", {}, about);
  if (answer.error) {
    about.append(element("p", { className: "error", textContent: answer.error }));
  } else {
    const picture = URL.createObjectURL(file);
    pictures.push(picture);
    item.prepend(element("img", { src: picture, alt: "" }));
    const title = answer.unknown ? "None of these classes" : answer.classes[0].name;
    about.append(element("p", { className: "best", textContent: title }));
    if (answer.unknown) { // probabilities would say which class it is, if it were one of them
      const similar = answer.classes.map(({ name }) => name).join(", ");
      about.append(element("p", { textContent: `It is unlike all of them. The most similar: ${similar}.` }));
      answer.classes = [];
    }
    const list = element("dl");
    for (const { name, probability } of answer.classes) {
      const bar = element("span");
      bar.style.width = `${100 * probability}%`;
      const value = element("dd", { textContent: percent(probability) });
      list.append(element("dt", { textContent: name, title: name }), value);
      list.append(element("dd", { className: "meter", ariaHidden: "true" }, bar));
    }
    about.append(list);
  }
  about.append(element("p", { className: "file", textContent: file.name, title: file.name }));
  return item;
}

// Teaching

let photos = [];
let latest = []; // the classes that were added last

function choose(files) {
  photos = files;
  $("chosen").textContent = files.length ? `${count(files.length, "photo")} chosen` : "";
}

async function teach(event) {
  event.preventDefault();
  if (!photos.length) {
    $("teach-error").textContent = "Choose photos of the class first.";
    return;
  }
  const body = new FormData();
  body.append("name", $("name").value);
  photos.forEach((file) => body.append("files", file));
  await working("sending photos", async () => {
    const begun = await call("teach", { method: "POST", body });
    await follow(begun.number, begun.skipped);
  });
}

/** Show the progress of a class until it is learned. */
async function follow(number, skipped = []) {
  let failures = 0;
  for (;;) {
    let lesson;
    try {
      lesson = await call("teach");
    } catch (error) { // the class may still be learned
      if (++failures > 10) throw error;
      await pause(1000);
      continue;
    }
    if (lesson.number !== number) {
      await show();
      $("taught").textContent = "The service was restarted, or another class was taught since: see the list of classes.";
      return;
    }
    if (lesson.state === "learning") {
      const { doing, done } = lesson.progress;
      $("doing").textContent = doing || "preparing";
      if (done === null) $("bar").removeAttribute("value");
      else $("bar").value = done;
      await pause(200);
      continue;
    }
    if (lesson.state === "failed") throw new Error(`${lesson.name} is not learned: ${lesson.error}`);
    const left = skipped.length ? ` Left out: ${skipped.join("; ")}.` : "";
    const notes = lesson.messages.length ? ` Note: ${lesson.messages.join(" ")}` : "";
    const summary = `Learned ${lesson.name} from ${count(lesson.photos, "photo")} in ${lesson.seconds.toFixed(1)} s.`;
    $("taught").textContent = summary + left + notes;
    $("name").value = "";
    choose([]);
    await show();
    return;
  }
}

const pause = (milliseconds) => new Promise((resolve) => setTimeout(resolve, milliseconds));

async function undo() {
  const names = latest.join(", ");
  if (!confirm(`Forget ${names}? Photos that were taught here are deleted.`)) return;
  await working("undoing", async () => {
    const body = new FormData();
    body.append("name", latest[0]);
    const { forgot } = await call("undo", { method: "POST", body });
    $("taught").textContent = `Forgot ${forgot.join(", ")}. The run is as it was before.`;
    await show();
  });
}

/** Do something that takes a while, and show what and whether it failed. */
async function working(doing, act) {
  $("teach-error").textContent = $("taught").textContent = "";
  $("doing").textContent = doing;
  busy(true);
  try {
    await act();
  } catch (error) {
    $("teach-error").textContent = error.message;
    await show().catch(() => {}); // somebody else may have changed what the run knows
  } finally {
    busy(false);
  }
}

function busy(yes) {
  $("learn").disabled = $("undo").disabled = yes;
  $("progress").hidden = !yes;
  $("bar").removeAttribute("value");
}

// What the run knows

async function show() {
  const [known, accuracy] = await Promise.all([call("classes"), call("accuracy")]);
  document.title = `${known.run} – pgp`;
  $("run").textContent = known.run;
  atOnce = Math.min(8, known.most_files);
  $("summary").textContent = `${count(known.classes.length, "class")} learned in ${count(known.tasks.length, "task")}`;
  $("problem").textContent = known.problem ? `The latest checkpoint cannot be used: ${known.problem}` : "";
  latest = known.can_undo ? known.tasks[0].classes : [];
  const names = latest.join(", ");
  $("undo").hidden = !known.can_undo;
  $("undo").textContent = `Undo ${names.length > 60 ? `${names.slice(0, 60)}…` : names}`;
  $("classes").tBodies[0].replaceChildren(...known.tasks.map(row));
  $("matrix").replaceChildren(matrix(accuracy));
  $("sign-in").hidden = true;
  $("content").hidden = false;
}

function row(task) {
  const names = task.classes.map((name) => element("span", { textContent: name }));
  const title = task.name ? `${task.number} ${task.name}` : `${task.number}`;
  return element(
    "tr", {},
    element("th", { scope: "row", textContent: title }),
    element("td", {}, element("div", { className: "chips" }, ...names)),
    element("td", { className: "number", textContent: count(task.training_images, "photo") }),
  );
}

function matrix({ accuracy, readout, task_given, tasks }) {
  const column = accuracy[readout] ? readout : Object.keys(accuracy)[0];
  if (!column) return element("p", { textContent: "Nothing was measured." });
  const among = task_given ? "the classes of its own task, which is given here" : "all classes learned by then";
  $("measured").textContent = `Each image is classified among ${among}. Readout ${column}. Rows: after task. Columns: on the images of task.`;
  const heads = tasks.map((name, index) => element("th", { scope: "col", className: "number", textContent: index + 1, title: name }));
  const rows = accuracy[column].map((values, after) => element(
    "tr", {},
    element("th", { scope: "row", textContent: after + 1 }),
    ...values.map((value, on) => cell(value, on <= after)),
  ));
  return element(
    "table", {},
    element("thead", {}, element("tr", {}, element("th", { scope: "col", textContent: "After" }), ...heads)),
    element("tbody", {}, ...rows),
  );
}

function cell(value, learned) {
  if (!learned) return element("td");
  if (value === null) return element("td", { className: "none", textContent: "–", title: "not measured" });
  const made = element("td", { textContent: (100 * value).toFixed(1) });
  made.style.background = `rgba(var(--shade), ${(0.45 * value).toFixed(2)})`;
  return made;
}

// Events

function accept(zone, input, use) {
  input.addEventListener("change", () => {
    use([...input.files]);
    input.value = ""; // so that the same photo can be chosen again
  });
  for (const name of ["dragover", "dragleave", "drop"]) {
    zone.addEventListener(name, (event) => {
      event.preventDefault();
      zone.classList.toggle("over", name === "dragover");
      if (name === "drop") use([...event.dataTransfer.files]);
    });
  }
}

for (const name of ["dragover", "drop"]) { // a photo that misses the field must not replace the page
  window.addEventListener(name, (event) => event.preventDefault());
}
accept($("ask-drop"), $("ask-files"), ask);
accept($("teach-drop"), $("teach-files"), choose);
$("teach").addEventListener("submit", teach);
$("undo").addEventListener("click", undo);
$("sign-in").addEventListener("submit", (event) => {
  event.preventDefault();
  signedInWith = $("token").value;
  sessionStorage.setItem("token", signedInWith);
  start();
});

async function start() {
  try {
    await show();
    const lesson = await call("teach");
    if (lesson.state === "learning") { // the page was loaded again while a class is being taught
      await working("", () => follow(lesson.number));
    }
  } catch (error) {
    $("summary").textContent = $("sign-in").hidden || signedInWith ? error.message : "";
  }
}

start();
