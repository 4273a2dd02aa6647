// Uses the page in headless Chromium as a person would: node browser.mjs FOLDER PACKAGES PROMPT COUNT, which prints JSON.
import { createReadStream, existsSync } from "node:fs";
import { mkdtemp, readFile, rm, writeFile } from "node:fs/promises";
import { createServer } from "node:http";
import { createRequire } from "node:module";
import { tmpdir } from "node:os";
import { extname, join } from "node:path";

const [folder, packages, prompt, count] = process.argv.slice(2);
const { chromium } = createRequire(join(packages, "x"))("playwright-core");
const TYPES = { ".html": "text/html", ".js": "text/javascript", ".css": "text/css", ".wasm": "application/wasm" };
const PATIENCE = 600_000; // milliseconds; the default of 30 s can be too little on a busy machine
const FLAGS = [
  "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
  "--disable-component-update", "--disable-sync",
];

let isReachable = true;

/**
 * Serves the folder while it is reachable. Below /damaged/, only the weights lack a byte: the page reads all files at
 * once.
 */
const server = createServer((request, response) => {
  if (!isReachable) return request.socket.destroy();
  const parts = new URL(request.url, "http://localhost").pathname.split("/");
  const path = join(folder, parts.at(-1) || "index.html");
  if (!existsSync(path)) return response.writeHead(404).end();
  response.writeHead(200, { "content-type": TYPES[extname(path)] ?? "application/octet-stream" });
  const start = parts.includes("damaged") && path.endsWith("weights.safetensors") ? 1 : 0;
  createReadStream(path, { start }).pipe(response);
});
await new Promise((resolve) => server.listen(0, "localhost", resolve));
const address = `http://localhost:${server.address().port}/`;

const profile = await mkdtemp(join(tmpdir(), "ramnet-chromium-"));
const context = await chromium.launchPersistentContext(profile, {
  executablePath: process.env.CHROMIUM, headless: true, args: FLAGS, colorScheme: "dark", timeout: PATIENCE,
});
context.setDefaultTimeout(PATIENCE);
const page = await context.newPage();
const errors = [];
page.on("pageerror", (error) => errors.push(error.message));

const ready = () => page.waitForSelector("#write:enabled");
const shown = () => page.inputValue("#text");
const status = () => page.textContent("#status");

async function open(path) {
  await page.goto(address + path);
  await ready();
  await page.fill("#temperature", "0");
  await page.selectOption("#pace", "0");
}

async function written(tokens) {
  await page.fill("#count", String(tokens));
  await page.focus("#text");
  await page.keyboard.press("Control+Enter");
  await ready();
  return shown();
}

/** The colours in the picture of the first head. */
const colours = () =>
  page.evaluate(async () => {
    await new Promise((resolve) => requestAnimationFrame(() => requestAnimationFrame(resolve)));
    const canvas = document.querySelector("canvas");
    const { data } = canvas.getContext("2d").getImageData(0, 0, canvas.width, canvas.height);
    const pixels = Array.from(new Uint32Array(data.buffer)).filter((pixel) => pixel !== 0);
    return [...new Set(pixels.map((pixel) => (pixel & 0xffffff).toString(16).padStart(6, "0")))].sort();
  });

const heights = () => page.locator("canvas").evaluateAll((all) => all.map((canvas) => canvas.height));

try {
  const found = {};
  await open("");
  await page.fill("#text", prompt);
  found.text = await written(count);
  found.more = await written(5);
  found.status = await status();
  found.colours = await colours();
  found.label = await page.getAttribute("canvas", "aria-label");
  found.heights = await heights();
  found.about = await page.textContent("#about");
  await page.selectOption("#layer", { label: "2" });
  found.second = { heights: await heights(), colours: await colours(), label: await page.getAttribute("canvas", "aria-label") };
  found.captions = await page.locator("figcaption").allTextContents();

  const download = page.waitForEvent("download");
  await page.click("#save");
  const file = await (await download).path();
  await page.setInputFiles("#file", file);
  await page.waitForFunction(() => document.getElementById("text").value === "");
  found.loaded = await status();
  await page.fill("#text", "x");
  found.after = await written(1);
  found.position = await status();
  const damaged = join(profile, "damaged");
  await writeFile(damaged, (await readFile(file)).subarray(0, 99));
  await page.setInputFiles("#file", damaged);
  await page.waitForFunction(() => document.getElementById("status").textContent.includes("state file"));
  found.refused = await status();

  await page.fill("#count", "1000000");
  await page.click("#write");
  await page.waitForFunction(() => document.getElementById("text").value.length > 100);
  await page.keyboard.press("Escape");
  await ready();
  found.stopped = await status();

  await page.evaluate(() => navigator.serviceWorker.ready);
  await context.setOffline(true);
  isReachable = false; // and keeps its port, which another process could take
  await open("");
  await page.fill("#text", prompt);
  found.offline = await written(count);
  await context.setOffline(false);
  isReachable = true;

  await page.goto(`${address}damaged/`);
  await page.waitForFunction(() => document.getElementById("status").textContent !== "Loading the model");
  found.damaged = await status();
  console.log(JSON.stringify({ ...found, errors }));
} finally {
  await context.close();
  server.close();
  await rm(profile, { recursive: true, force: true });
}
