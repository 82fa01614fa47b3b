"""Launch the page of a Space on this machine, ask it once as its users' programs do, and print the answer as JSON.

    python tests/support/space.py distribution/spaces/memory/app.py memory '["gpt2", ...]'

A process of its own, since gradio and its client leave sockets and event loops open.
"""

import importlib.util
import json
import os
import socket
import sys

os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"

from gradio_client import Client

path, name, arguments = sys.argv[1:]
spec = importlib.util.spec_from_file_location("app", path)
app = importlib.util.module_from_spec(spec)
spec.loader.exec_module(app)
page = app.interface()
with socket.create_server(("127.0.0.1", 0)) as free:  # gradio's own search for a port races with other processes
    port = free.getsockname()[1]
_, url, _ = page.launch(server_name="127.0.0.1", server_port=port, prevent_thread_lock=True, quiet=True)
answer = Client(url, verbose=False, analytics_enabled=False).predict(*json.loads(arguments), api_name=f"/{name}")
page.close()
print(json.dumps(answer, default=str))
