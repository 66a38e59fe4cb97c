"""Fine-tuning from texts alone (ALoFTRAG): rate texts, ask about them, rate the questions."""
