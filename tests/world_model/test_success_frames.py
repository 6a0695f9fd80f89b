import torch
from hypothesis import given
from hypothesis import strategies as st

from world_model.evaluation import claims, evaluate_imagined_success
from world_model.frames import stack_cameras
from world_model.pipeline import WorldModelOutput
from world_model.rollout import Windows
from world_model.success_training import shift_frames


def test_frames_of_a_row_move_together_and_repeat_the_border():
    frames = torch.arange(64, dtype=torch.uint8).reshape(1, 1, 1, 8, 8).expand(6, 2, 3, 8, 8).clone()
    moved = shift_frames(frames, 2, torch.Generator().manual_seed(0))
    assert moved.shape == frames.shape
    assert all(torch.equal(row[0], row[1]) for row in moved)
    places = set()
    for row in moved[:, 0, 0]:
        found = [(x, y) for x in range(-2, 3) for y in range(-2, 3) if torch.equal(row, frames[0, 0, 0][
            (torch.arange(8) + y).clamp(0, 7)][:, (torch.arange(8) + x).clamp(0, 7)])]
        assert len(found) == 1
        places.add(found[0])
    assert len(places) > 1
    assert shift_frames(frames, 0, torch.Generator()) is frames


class Physics:
    """A fake model that knows the toy world's rule: the square moves by five pixels per unit of action."""

    def __init__(self, stride):
        self.stride = stride
        self.denoiser = type("Model", (), {"chunk": 1})

    def __call__(self, frames, actions, proprio, instruction, generator, num_inference_steps):
        place = (proprio[:, -1] * 32 + self.stride * actions[:, -1]).clamp(0, 26)
        painted = torch.full_like(frames[:, -1], 40)
        for row, (x, y) in enumerate(place.round().int().tolist()):
            painted[row, :, y : y + 6, x : x + 6] = torch.tensor([230, 200, 60], dtype=torch.uint8)[:, None, None]
        return WorldModelOutput(frames=painted[:, None], proprio=(place / 32)[:, None], error=torch.ones(len(place), 1))


class TouchesTheEdge(torch.nn.Module):
    """A fake success model that knows the rule; by proprio, since the picture is rounded to pixels."""

    def __init__(self):
        super().__init__()
        self.unused = torch.nn.Parameter(torch.zeros(1))

    def forward(self, frames, proprio, tokens):
        return (proprio[:, 1, 0] * 32 >= 26 - 1e-4).float()


def test_false_and_missed_successes_are_counted(store):
    def measure(stride):
        return evaluate_imagined_success(
            store, Physics(stride), TouchesTheEdge(), episodes=range(40), windows=200, horizon=8, threshold=0.5, seed=0,
            success_frames=1, context=4, inference_steps=1)

    right, slow, fast = measure(5), measure(0), measure(15)
    won = sum(store.episodes.success[:40] == "yes")
    assert right["success_missed_windows"] == won
    assert (right["success_false"], right["success_missed"], right["success_onset_off"]) == (0, 0, 0)
    assert right["success_ece_imagined"] == 0
    assert right["success_auroc_imagined"] == 1
    assert slow["success_missed"] == 1
    assert slow["success_false"] == 0
    assert fast["success_false"] > 0.1
    assert fast["success_onset_off"] > 0.5


def test_stacked_cameras_keep_their_order():
    red, blue = torch.zeros(2, 4, 4, 3, dtype=torch.uint8), torch.full((2, 4, 4, 3), 9, dtype=torch.uint8)
    stacked = stack_cameras({"b": blue, "a": red}, ("a", "b"))
    assert stacked.shape == (2, 6, 4, 4)
    assert stacked[:, :3].max() == 0
    assert stacked[:, 3:].min() == 9


@given(probability=st.lists(st.floats(0, 1), min_size=6, max_size=6), length=st.integers(1, 6),
       onset=st.integers(0, 6), frames=st.integers(1, 4))
def test_a_claim_is_so_many_frames_in_a_row(probability, length, onset, frames):
    number = torch.arange(6)
    windows = Windows(contexts=[], instruction=[], action=torch.zeros(1, 6, 1), proprio=torch.zeros(1, 6, 1),
                      frames=torch.zeros(1, 6, 3, 2, 2, dtype=torch.uint8), mask=(number < length)[None],
                      known=(number < length)[None], done=((number >= onset) & (number < length))[None])
    made = claims(torch.tensor([probability]), windows, threshold=0.5, success_frames=frames)[0].tolist()
    shown = max(0, length - onset)
    needed = min(frames, shown) if shown else frames
    for i in range(6):
        before = range(i - needed + 1, i + 1)
        assert made[i] == all(0 <= j < length and probability[j] >= 0.5 for j in before)
