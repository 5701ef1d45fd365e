"""Answers questions over HTTP, one at a time: python examples/serve.py [--model FOLDER] [--host HOST] [--port PORT].

A request is a POST of {"question": "what colour is it?", "media": [{"type": "image", "base64": "..."}]}, with "video", "audio",
"speech" alike; the response is {"answer": "red"}, or {"error": "..."} with status 400.
"""

import argparse
import base64
import binascii
import json
from http.server import BaseHTTPRequestHandler, HTTPServer

from transformers import pipeline

import unimoe

LARGEST_REQUEST = 100_000_000
KINDS = ("image", "video", "audio", "speech")


def read_chat(body: bytes) -> list[dict]:
    """The chat that a request asks for. Raises ValueError where it is none."""
    request = json.loads(body)
    if not isinstance(request, dict) or not isinstance(request.get("question"), str):
        raise ValueError('a request is an object with a text "question"')
    content = []
    for item in request.get("media") or []:
        if not isinstance(item, dict) or item.get("type") not in KINDS or not isinstance(item.get("base64"), str):
            raise ValueError(f'an item of "media" is an object with "type", one of {", ".join(KINDS)}, and "base64"')
        try:
            # Bytes, so that no client can name a file or a URL for the server to open.
            data = base64.b64decode(item["base64"], validate=True)
        except binascii.Error as error:
            raise ValueError(f"base64: {error}") from None
        content.append({"type": item["type"], item["type"]: data})
    return [{"role": "user", "content": [*content, {"type": "text", "text": request["question"]}]}]


def make_server(model: str, host: str, port: int) -> HTTPServer:
    """A server that has its model loaded and listens; `serve_forever` makes it answer."""
    pipe = pipeline("any-to-text", model=model)

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            try:
                length = int(self.headers.get("Content-Length") or 0)
                if not 0 < length <= LARGEST_REQUEST:
                    raise ValueError(f"a request has 1 to {LARGEST_REQUEST} bytes, this one {length}")
                result = pipe(read_chat(self.rfile.read(length)), return_full_text=False)
                self.respond(200, {"answer": result[0]["generated_text"].strip()})
            except (ValueError, TypeError) as error:
                self.respond(400, {"error": str(error)})

        def respond(self, status: int, content: dict) -> None:
            body = json.dumps(content).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

    return HTTPServer((host, port), Handler)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default=unimoe.tiny_checkpoint())
    parser.add_argument("--host", default="localhost")
    parser.add_argument("--port", type=int, default=8000)
    args = parser.parse_args()
    make_server(args.model, args.host, args.port).serve_forever()


if __name__ == "__main__":
    main()
