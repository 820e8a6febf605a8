"""A web server on asyncio that counts the requests of each connection.

Beside that it checks its own clocks and writes a numbered line to the system log ten times a
second. What it finds wrong it prints as an error, which the journal shows.
"""

import asyncio
import sys
import syslog
import tempfile
import time

TICK = 0.1


def complain(what):
    print(f"<3>stock: {what}", file=sys.stderr, flush=True)


async def serve(reader, writer):
    count = 0
    try:
        while await reader.readuntil(b"\r\n\r\n"):
            count += 1
            body = f"count {count}".encode()
            writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n%s" % (len(body), body))
            await writer.drain()
    except (asyncio.IncompleteReadError, ConnectionError):
        pass
    writer.close()


async def tick(scratch):
    number, last = 0, time.monotonic()
    while True:
        begin = time.monotonic()
        await asyncio.sleep(TICK)
        now = time.monotonic()
        if now < last:
            complain(f"the clock went back from {last} to {now}")
        # One clock tick of the loop is allowed for.
        if now - begin < TICK - 0.01:
            complain(f"a sleep of {TICK} s ended after {now - begin}")
        last = now
        number += 1
        syslog.syslog(f"tick {number}")
        scratch.seek(0)
        text = scratch.read()
        if text and text != str(number - 1):
            complain(f"the temporary file says {text} in place of {number - 1}")
        scratch.seek(0)
        scratch.truncate()
        scratch.write(str(number))
        scratch.flush()


async def main():
    syslog.openlog("stock-python")
    server = await asyncio.start_server(serve, "0.0.0.0", int(sys.argv[1]))
    with tempfile.TemporaryFile("w+") as scratch:
        await asyncio.gather(server.serve_forever(), tick(scratch))


asyncio.run(main())
