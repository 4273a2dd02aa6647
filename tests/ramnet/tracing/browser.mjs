// Uses the page in headless Chromium as a person would: node browser.mjs PAGE PACKAGES TOKEN, which prints JSON.
import { createRequire } from "node:module";
import { join } from "node:path";
import { pathToFileURL } from "node:url";

const [file, packages, token] = process.argv.slice(2);
const { chromium } = createRequire(join(packages, "x"))("playwright-core");
const PATIENCE = 600_000; // milliseconds; the default of 30 s can be too little on a busy machine
const browser = await chromium.launch({
  executablePath: process.env.CHROMIUM, args: ["--no-sandbox", "--disable-gpu", "--no-first-run"], timeout: PATIENCE,
});
const page = await browser.newPage();
page.setDefaultTimeout(PATIENCE);
const errors = [], asked = [];
page.on("pageerror", (error) => errors.push(error.message));
page.on("request", (request) => asked.push(request.url()));

/** What the page says of the selected token, and the tokens that it marks. */
const shown = () =>
  page.evaluate(() => ({
    selected: document.querySelector("[aria-selected=true]").id,
    rows: [...document.querySelectorAll("#sources tr")].map((row) => [...row.cells].map((cell) => cell.textContent)),
    marked: [...document.querySelectorAll("[role=option]")].flatMap((span, i) => (span.style.background ? [i] : [])),
    written: document.getElementById("write").textContent,
  }));

/** The colours in the picture. */
const colours = () =>
  page.evaluate(async () => {
    await new Promise((resolve) => requestAnimationFrame(() => requestAnimationFrame(resolve)));
    const canvas = document.querySelector("canvas");
    const { data } = canvas.getContext("2d").getImageData(0, 0, canvas.width, canvas.height);
    const pixels = new Set();
    for (let i = 0; i < data.length; i += 4) if (data[i + 3] === 255) pixels.add(data.slice(i, i + 3).join(" "));
    return [...pixels];
  });

try {
  await page.goto(pathToFileURL(file).href);
  const found = { title: await page.title(), heads: await page.locator("#head option").allTextContents() };
  await page.hover(`#token-${token}`);
  found.hovered = await shown();
  await page.focus(`#token-${token}`);
  await page.keyboard.press("ArrowLeft");
  found.moved = await shown();
  await page.focus("#head");
  await page.selectOption("#head", "1");
  found.other = await shown();
  const canvas = await page.locator("canvas").boundingBox();
  await page.mouse.move(canvas.x + 1, canvas.y + 1);
  found.pointed = (await shown()).selected;
  found.light = await colours();
  await page.emulateMedia({ colorScheme: "dark" });
  found.dark = await colours();
  console.log(JSON.stringify({ ...found, errors, asked }));
} finally {
  await browser.close();
}
