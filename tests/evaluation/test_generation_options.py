"""What a task asks to generate: options that change nothing are accepted, all others are named."""

import pytest

from moejax.errors import UserError
from moejax.evaluation.generation_options import NEUTRAL, OF_BEAMS, OF_THE_PROGRAM, Generation, generation
from moejax.inference.sampling import Sampling

GREEDY = {"until": ["\n"], "max_gen_toks": 8, "do_sample": False, "temperature": 0.0}


@pytest.mark.parametrize("name, value", [*NEUTRAL.items(), *((name, None) for name in NEUTRAL)])
def test_an_option_at_its_neutral_value_changes_nothing(name, value):
  assert generation("task", GREEDY | {name: value}) == Generation(Sampling(), ("\n",), 8)


@pytest.mark.parametrize("name", [*OF_BEAMS, *OF_THE_PROGRAM])
def test_an_option_without_an_effect_here_is_accepted_at_any_value(name):
  assert generation("task", GREEDY | {"num_beams": 1, name: 3}) == generation("task", GREEDY)


@pytest.mark.parametrize("name, value", [*((name, value + 2) for name, value in NEUTRAL.items()), ("max_length", 5)])
def test_an_option_that_would_change_the_text_is_refused_with_its_name_and_value(name, value):
  with pytest.raises(UserError, match=rf"the task summary generates with {name}={value}, which moejax does not"):
    generation("summary", GREEDY | {name: value})


def test_sampling_is_as_asked_and_without_it_the_best_token_is_taken():
  asked = {"until": [], "max_gen_toks": 4, "do_sample": True, "temperature": 0.5, "top_p": 0.9, "top_k": 0}
  assert generation("task", asked).sampling == Sampling(temperature=0.5, top_p=0.9)
  assert generation("task", asked | {"top_k": 7}).sampling == Sampling(temperature=0.5, top_k=7, top_p=0.9)
  assert generation("task", asked | {"do_sample": False}).sampling == Sampling()


@pytest.mark.parametrize(
  "options, complaint",
  [
    ({"do_sample": True}, "samples .* with a temperature that is not above 0"),
    ({"max_gen_toks": 0}, "max_gen_toks=0, which must be at least 1"),
  ],
)
def test_options_that_contradict_themselves_are_refused(options, complaint):
  with pytest.raises(UserError, match=complaint):
    generation("task", GREEDY | options)
