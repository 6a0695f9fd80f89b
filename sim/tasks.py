"""Task names and the sentences a policy may be given for each."""

from __future__ import annotations

DEMO_TASKS = ("drawer-close-v3", "handle-press-v3", "door-close-v3", "coffee-button-v3")
"""Tasks that a small policy improves on within minutes."""

PHRASINGS: dict[str, tuple[str, ...]] = {
    "drawer-close-v3": ("close the drawer", "push the drawer shut", "shut the green drawer", "slide the drawer in"),
    "handle-press-v3": ("press the handle down", "push down the red handle", "press the lever down",
                        "lower the handle"),
    "door-close-v3": ("close the door", "push the door shut", "shut the door of the safe", "swing the door closed"),
    "coffee-button-v3": ("press the button of the coffee machine", "push the coffee button",
                         "turn on the coffee machine", "start the coffee machine"),
    "reach-v3": ("reach the goal", "move the hand to the goal", "go to the marker", "bring the gripper to the target"),
    "push-v3": ("push the puck to the goal", "slide the puck to the marker", "move the puck to the target",
                "shove the puck onto the goal"),
    "pick-place-v3": ("pick up the puck and place it at the goal", "lift the puck to the marker",
                      "grasp the puck and bring it to the target", "carry the puck to the goal"),
    "door-open-v3": ("open the door", "pull the door open", "swing the door open", "open the safe"),
    "drawer-open-v3": ("open the drawer", "pull the drawer out", "slide the drawer open", "pull the green drawer"),
    "button-press-topdown-v3": ("press the button from above", "push the button down", "press down on the button",
                                "hit the button from the top"),
    "peg-insert-side-v3": ("insert the peg into the hole", "put the peg in the box", "push the peg into the side hole",
                           "fit the peg in the hole"),
    "window-open-v3": ("open the window", "slide the window open", "push the window open",
                       "move the window to the right"),
    "window-close-v3": ("close the window", "slide the window shut", "push the window closed",
                        "move the window to the left"),
    "pusht": ("push the T onto the green outline", "slide the block to the target", "cover the green T",
              "bring the T into place"),
}
"""At least four sentences for MT10's tasks, the demo's and PushT. Others get ``phrasings``' template."""

TASKS = (
    "assembly-v3", "basketball-v3", "bin-picking-v3", "box-close-v3", "button-press-topdown-v3",
    "button-press-topdown-wall-v3", "button-press-v3", "button-press-wall-v3", "coffee-button-v3", "coffee-pull-v3",
    "coffee-push-v3", "dial-turn-v3", "disassemble-v3", "door-close-v3", "door-lock-v3", "door-open-v3",
    "door-unlock-v3", "hand-insert-v3", "drawer-close-v3", "drawer-open-v3", "faucet-open-v3", "faucet-close-v3",
    "hammer-v3", "handle-press-side-v3", "handle-press-v3", "handle-pull-side-v3", "handle-pull-v3", "lever-pull-v3",
    "peg-insert-side-v3", "pick-place-wall-v3", "pick-out-of-hole-v3", "reach-v3", "push-back-v3", "push-v3",
    "pick-place-v3", "plate-slide-v3", "plate-slide-side-v3", "plate-slide-back-v3", "plate-slide-back-side-v3",
    "peg-unplug-side-v3", "soccer-v3", "stick-push-v3", "stick-pull-v3", "push-wall-v3", "reach-wall-v3",
    "shelf-place-v3", "sweep-into-v3", "sweep-v3", "window-open-v3", "window-close-v3",
)  # fmt: skip
"""Every task of Meta-World 3."""


MIXES: dict[str, tuple[str, ...]] = {
    "mt10": ("reach-v3", "push-v3", "pick-place-v3", "door-open-v3", "drawer-open-v3", "drawer-close-v3",
             "button-press-topdown-v3", "peg-insert-side-v3", "window-open-v3", "window-close-v3"),
    "mt25": ("reach-v3", "push-v3", "pick-place-v3", "door-open-v3", "drawer-open-v3", "drawer-close-v3",
             "button-press-topdown-v3", "peg-insert-side-v3", "window-open-v3", "window-close-v3", "coffee-pull-v3",
             "pick-out-of-hole-v3", "disassemble-v3", "pick-place-wall-v3", "basketball-v3", "stick-pull-v3",
             "button-press-wall-v3", "faucet-open-v3", "door-lock-v3", "lever-pull-v3", "sweep-into-v3",
             "faucet-close-v3", "coffee-button-v3", "button-press-topdown-wall-v3", "dial-turn-v3"),
    "mt50": TASKS,
}
"""Meta-World's own mixes of tasks."""

HELD_OUT: dict[str, tuple[str, ...]] = {
    "drawer-close-v3": ("make the drawer go back in", "the drawer should not stay open"),
    "handle-press-v3": ("force the bar downwards", "squeeze the red bar to the bottom"),
    "door-close-v3": ("make the safe closed again", "the door should not stay open"),
    "coffee-button-v3": ("make me a coffee", "get the espresso maker going"),
    "reach-v3": ("touch the red dot", "have the arm arrive at the dot"),
    "push-v3": ("get the disc over to the dot", "nudge the disc towards the spot"),
    "pick-place-v3": ("take the disc up to the dot", "hoist the disc until it meets the spot"),
    "door-open-v3": ("make the safe accessible", "the door should not stay shut"),
    "drawer-open-v3": ("get at what is in the drawer", "the drawer should not stay shut"),
    "button-press-topdown-v3": ("squeeze the red knob from overhead", "tap the knob downwards"),
    "peg-insert-side-v3": ("plug the stick into the opening", "slot the stick sideways"),
    "window-open-v3": ("let some fresh air in", "draw the pane aside"),
    "window-close-v3": ("keep the fresh air out", "draw the pane back"),
    "pusht": ("match the letter with its shadow", "park the grey shape where it belongs"),
}
"""Sentences of the same meaning that no episode uses unless its phrasing is perturbed."""


def phrasings(task: str, kind: str = "usual") -> tuple[str, ...]:
    """List the sentences that name ``task``; which one an episode uses is decided by its seed.

    ``kind`` is one of ``sim.perturbation.PHRASINGS``: what is trained on, other sentences, or these within a longer
    request.
    """
    words = task.removesuffix("-v3").replace("-", " ")
    if kind == "usual":
        return PHRASINGS.get(task, (f"do the {words} task", f"{words}", f"please {words}", f"perform {words}"))
    held_out = HELD_OUT.get(task, (f"now carry out {words}", f"your job is {words}"))
    if kind == "held_out":
        return held_out
    return tuple(wordy(sentence) for sentence in held_out)


def wordy(sentence: str) -> str:
    """Within a longer request."""
    return f"when you are ready i would like you to do this for me {sentence}"
