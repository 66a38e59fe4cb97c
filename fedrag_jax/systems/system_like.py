"""Builds a system with another system's models, adapters and prompts over other passages."""

from collections.abc import Sequence

from fedrag_jax.data.examples import Example, Passage
from fedrag_jax.models import hub
from fedrag_jax.rag import RAGSystem
from fedrag_jax.retrieval.index.by_name import lies_elsewhere
from fedrag_jax.retrieval.stores.passage_source import PassageSource


def system_like(
    system: RAGSystem,
    passages: Sequence[Passage] = (),
    examples: Sequence[Example] = (),
    store: PassageSource | None = None,
    top_k: int | None = None,
    progress: bool = False,
) -> RAGSystem:
    """Returns a system with the same models, adapters and prompts over another corpus or store.

    The kind of index is the same, unless its vectors are in a service or a folder, where those of the
    other corpus would replace them: then the search is exact.

    Args:
      passages, examples, store: as in `RAGSystem.build`.
      top_k: as in `RAGSystem.build`; default: the system's value.
    """
    retriever, prompts = system.retriever, system.prompts
    document = hub.Pretrained(
        retriever.encoder, retriever.document, retriever.tokenizer, "document encoder"
    )
    index = {"index": system.index, "index_options": system.index_options}
    if lies_elsewhere(system.index, system.index_options):
        index = {}
    return RAGSystem.build(
        passages,
        examples,
        store=store,
        generator=system.generator,
        retriever=document,
        vectors=retriever.dtype,
        head=retriever.head,
        **index,
        adapters=system.decoder.lora,
        prompt_style=prompts.bare,
        system_prompt=prompts.system,
        top_k=system.top_k if top_k is None else top_k,
        marginal_k=system.marginal_k,
        score_scale=system.score_scale,
        max_passage_tokens=prompts.max_passage_tokens,
        max_answer_tokens=prompts.max_answer_tokens,
        searching=system.searching,
        progress=progress,
    ).replace(adapters=system.adapters, query=retriever.query)
