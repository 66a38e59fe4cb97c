"""The server's side."""

from fedrag_jax.integrations.flower.searches import search_parties
from fedrag_jax.integrations.flower.server import server_app
from fedrag_jax.integrations.flower.systems import server_callbacks, server_plan

app = server_app(server_plan, "server/run", callbacks=server_callbacks, search=search_parties)
