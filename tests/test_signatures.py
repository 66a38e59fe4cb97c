"""Options that pass through by name have names that editors know: those of what takes them."""

import dataclasses
import inspect
import typing

import fedrag_jax as fr
from fedrag_jax.federated.algorithms.by_name import ALGORITHMS
from fedrag_jax.federated.work import Work, WorkOptions
from fedrag_jax.generation.text import AnsweringOptions, Sampling, SamplingOptions

PASSED_ON = inspect.Parameter.VAR_KEYWORD


def names(cls) -> set[str]:
    return {field.name for field in dataclasses.fields(cls)}


def test_options_by_name_are_the_settings():
    assert names(Work) == WorkOptions.__annotations__.keys()
    assert names(Sampling) == SamplingOptions.__annotations__.keys()
    read = inspect.signature(fr.RAGSystem.read).parameters
    own = AnsweringOptions.__annotations__.keys() - SamplingOptions.__annotations__.keys()
    assert own <= {name for name, p in read.items() if p.kind is inspect.Parameter.KEYWORD_ONLY}


def test_what_people_call_first_tells_its_options():
    called = [getattr(fr, name) for name in fr.__all__ if inspect.isfunction(getattr(fr, name))]
    methods = [getattr(fr.RAGSystem, n) for n in ("query", "batch_query", "read", "aquery")]
    assert len(called) > 20 and len(ALGORITHMS) > 10
    for function in [*called, *methods]:
        for parameter in inspect.signature(function).parameters.values():
            if parameter.kind is PASSED_ON:
                told = typing.get_origin(parameter.annotation), function.__qualname__
                assert told[0] is typing.Unpack, told


def test_training_returns_its_result_and_not_its_rounds():
    assert inspect.signature(fr.fit).return_annotation is fr.FitResult
