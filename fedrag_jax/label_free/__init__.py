"""Label-free fine-tuning (ALoFTRAG): rate texts, write questions about them, rate the questions."""
