"""The server's side."""

from fedrag_jax.integrations.flower.server import server_app
from fedrag_jax.integrations.flower.systems import server_plan

app = server_app(server_plan, "server/run")
