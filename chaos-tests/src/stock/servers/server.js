// A web server that counts the requests of each connection, beside timers, a worker thread and
// files that are written and read in the thread pool.
"use strict";

const fs = require("fs/promises");
const http = require("http");
const { Worker, isMainThread, parentPort } = require("worker_threads");

const complain = (what) => console.error(`<3>stock: ${what}`);

if (!isMainThread) {
  parentPort.on("message", (number) => parentPort.postMessage(number + 1));
} else {
  const server = http.createServer((question, answer) => {
    const socket = question.socket;
    socket.count = (socket.count || 0) + 1;
    const body = `count ${socket.count}`;
    answer.writeHead(200, { "Content-Length": body.length });
    answer.end(body);
  });
  server.keepAliveTimeout = 600_000;
  server.listen(Number(process.argv[2]), "0.0.0.0");

  const worker = new Worker(__filename);
  let sent = 0;
  worker.on("message", (number) => {
    if (number !== sent + 1) complain(`the worker made ${number} of ${sent}`);
    sent = number;
    setTimeout(() => worker.postMessage(sent), 5);
  });
  worker.postMessage(sent);

  const file = `${process.argv[3]}/number`;
  const write = async (number) => {
    await fs.writeFile(file, String(number));
    const text = await fs.readFile(file, "utf8");
    if (text !== String(number)) complain(`the file says ${text} in place of ${number}`);
    setTimeout(write, 20, number + 1);
  };
  write(0).catch((error) => complain(error));

  let last = process.hrtime.bigint();
  setInterval(() => {
    const now = process.hrtime.bigint();
    if (now < last) complain(`the clock went back from ${last} to ${now}`);
    last = now;
  }, 50);
}
