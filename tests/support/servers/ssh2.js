// An SSH server on npm's ssh2, with forwarding and commands in the library's own words; takes any key.
//
//     node ssh2.js HOST_KEY    prints its port

const { spawn } = require("child_process");
const fs = require("fs");
const net = require("net");
const { Server } = require("ssh2");

function join(socket, channel) {
  socket.on("error", () => channel.close());
  channel.on("error", () => socket.destroy());
  channel.on("close", () => socket.destroy());
  channel.pipe(socket).pipe(channel);
}

function run(channel, command) {
  const child = spawn("/bin/sh", ["-c", command]);
  channel.pipe(child.stdin);
  child.stdin.on("error", () => {});
  child.stdout.pipe(channel, { end: false });
  child.stderr.pipe(channel.stderr, { end: false });
  child.on("close", (code, signal) => {
    if (code === null) channel.exit(signal.replace("SIG", ""), false, "");
    else channel.exit(code);
    channel.end();
  });
}

function serve(client) {
  const listeners = new Map();
  const end = () => listeners.forEach((listener) => listener.close());
  client.on("error", () => {});
  client.on("close", end);
  client.on("authentication", (attempt) => (attempt.method === "publickey" ? attempt.accept() : attempt.reject(["publickey"])));
  client.on("session", (accept) => {
    accept().on("exec", (accept, reject, { command }) => run(accept(), command));
  });
  client.on("tcpip", (accept, reject, { destIP, destPort }) => {
    const socket = net.connect({ host: destIP, port: destPort, allowHalfOpen: true });
    socket.once("connect", () => join(socket, accept()));
    socket.once("error", () => reject());
  });
  client.on("request", (accept, reject, name, { bindAddr, bindPort }) => {
    if (name === "cancel-tcpip-forward") {
      const listener = listeners.get(bindPort);
      if (!listener) return reject && reject();
      listeners.delete(bindPort);
      listener.close();
      return accept && accept();
    }
    if (name !== "tcpip-forward") return reject && reject();
    const listener = net.createServer({ allowHalfOpen: true }, (socket) => {
      const { remoteAddress, remotePort } = socket;
      client.forwardOut(bindAddr, listener.address().port, remoteAddress, remotePort, (error, channel) => {
        if (error) socket.destroy();
        else join(socket, channel);
      });
    });
    listener.once("error", () => reject && reject());
    listener.listen(bindPort, "127.0.0.1", () => {
      listeners.set(listener.address().port, listener);
      if (accept) accept(bindPort ? undefined : listener.address().port);
    });
  });
}

const server = new Server({ hostKeys: [fs.readFileSync(process.argv[2])] }, serve);
server.listen(0, "127.0.0.1", () => console.log(server.address().port));
