from types import SimpleNamespace

import numpy as np
import pytest

from data.types import UserError
from sim.evaluation import evaluate_policy
from sim.perturbation import Perturbation
from sim.report import ReportData, write_report
from tests.wm_rl.cluster import toy
from wm_rl.evaluation import EvaluationConfig
from wm_rl.journal import Journal
from wm_rl.robustness import judge_perturbed, summary

CONFIG = EvaluationConfig(trials_per_task=20, first_seed=10, modes=["sampled"], videos_per_task=1)


class Dimmable(toy.ToyEnv):
    """Succeeds at even seeds; in the dark at those that 4 divides."""

    factors, row_tasks, perturbation = frozenset({"light", "latency"}), ("reach",), Perturbation()

    def perturb(self, perturbation):
        self.perturbation = perturbation

    def won(self):
        return self.seed % (4 if self.perturbation.light != (1, 1, 1) else 2) == 0


class Still:
    chunk, version = 1, 0

    def act(self, observation, seeds):
        shape = (len(observation.slot), 1, 3)
        return SimpleNamespace(token=np.zeros(shape, np.int16), action=np.zeros(shape, np.float32),
                               log_prob=np.zeros(shape, np.float32), value=np.zeros(shape[0], np.float32))


def test_each_condition_is_paired_with_the_unperturbed_trials(tmp_path, capsys):
    env = Dimmable(1)
    usual = env.perturbation
    nominal = evaluate_policy(env, Still(), trials_per_task=20, first_seed=10, sample=True, keep=1)
    suite = {"dark": Perturbation(light=(0.5, 0.5, 0.5)), "late": Perturbation(latency=1),
             "foggy": Perturbation(zoom=2)}
    rows = judge_perturbed(env, Still(), nominal, suite, CONFIG, Journal(tmp_path, [], enabled=True))
    assert "no such thing: foggy" in capsys.readouterr().out
    assert [row.name for row in rows] == ["unperturbed", "dark", "late"]
    # of seeds 10 to 29, 2 divides ten and 4 divides 12, 16, 20, 24, 28
    assert [row.success.estimate for row in rows] == [0.5, 0.25, 0.5]
    assert [row.difference.estimate for row in rows] == [0, -0.25, 0]
    assert rows[1].difference.high < 0
    assert env.perturbation == usual
    assert summary(rows)["dark"]["trials"] == 20
    page = write_report(tmp_path / "report.html", ReportData(
        title="t", verdict="v", passed=None, perturbed=rows)).read_text()
    assert page.count('alt="first frame"') == 3
    assert "dark: reach the goal" in page


def test_what_cannot_be_perturbed_says_so(tmp_path):
    env = toy.ToyEnv(1)
    with pytest.raises(UserError, match="cannot be perturbed; type perturbations=none"):
        judge_perturbed(env, Still(), None, {"late": Perturbation(latency=1)}, CONFIG,
                        Journal(tmp_path, [], enabled=False))
