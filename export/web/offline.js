/** Keeps the files of the page, so that it works without a network. A file from the network replaces the one kept. */

const KEPT = "ramnet";

async function keepAll() {
  const { files } = await (await fetch("ramnet.json")).json();
  await (await caches.open(KEPT)).addAll(["./", "ramnet.json", ...Object.keys(files)]);
}

async function answer(request) {
  const kept = await caches.open(KEPT);
  try {
    const response = await fetch(request);
    if (response.ok) await kept.put(request, response.clone()).catch(() => {}); // there may be no room for it
    return response;
  } catch (error) {
    const found = await kept.match(request, { ignoreSearch: true });
    if (found) return found;
    throw error;
  }
}

self.addEventListener("install", (event) => event.waitUntil(keepAll().then(() => self.skipWaiting())));
self.addEventListener("activate", (event) => event.waitUntil(self.clients.claim()));
self.addEventListener("fetch", (event) => {
  const { method, url } = event.request;
  if (method === "GET" && new URL(url).origin === location.origin) event.respondWith(answer(event.request));
});
