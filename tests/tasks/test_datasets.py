"""The data sets by name."""

import inspect

import pytest

from lossguard.tasks.datasets import DATASETS, load_dataset


def test_every_loader_has_the_name_that_it_is_listed_under() -> None:
    assert all(loader.__name__ == name for name, loader in DATASETS.items())


def test_every_loader_takes_a_scaling_and_works_without_arguments() -> None:
    for loader in DATASETS.values():
        parameters = inspect.signature(loader).parameters
        assert "scaling" in parameters
        assert all(parameter.default is not parameter.empty for parameter in parameters.values())


def test_options_reach_the_loader() -> None:
    data = load_dataset("moons", samples=30, scaling="standardized")
    assert data.name == "moons" and data.train.inputs.shape == (30, 2)


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("minst", " (did you mean mnist?)"),
        ("cifar-10", " (did you mean cifar10?)"),
        ("fashion_mist", " (did you mean fashion_mnist?)"),
        ("xyz", ""),
    ],
)
def test_a_wrong_name_lists_the_nearest_and_all(name: str, hint: str) -> None:
    with pytest.raises(ValueError) as caught:
        load_dataset(name)
    assert str(caught.value) == (
        f"data set must be one of {', '.join(DATASETS)}, got {name!r}{hint}"
    )


def test_a_wrong_option_lists_the_nearest_and_all() -> None:
    with pytest.raises(ValueError) as caught:
        load_dataset("mnist", sclaing="unit")
    assert str(caught.value) == (
        "an option of mnist must be one of scaling, got 'sclaing' (did you mean scaling?)"
    )
