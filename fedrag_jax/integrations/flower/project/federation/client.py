"""A party's side."""

from fedrag_jax.integrations.flower.party import client_app
from fedrag_jax.integrations.flower.party_search import share_passages
from fedrag_jax.integrations.flower.systems import party_plan, party_questions, party_system

app = client_app(party_plan, party_questions)
share_passages(app, party_system)  # only if its node is told to
