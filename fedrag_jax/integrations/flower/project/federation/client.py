"""A party's side."""

from fedrag_jax.integrations.flower.party import client_app
from fedrag_jax.integrations.flower.systems import party_plan, party_questions

app = client_app(party_plan, party_questions)
