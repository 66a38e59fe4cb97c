"""Text from decoders: tokens, strings and streams, beams, likelihoods, ways to answer, endpoints."""
