"""Text generation: tokens, strings and streams, beam search, likelihoods, answering modes,
endpoints."""
