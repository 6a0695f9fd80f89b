from wm_rl.commands.benchmark_async_endurance import _grew, _quarters

MB = 10**6


def samples(memory, files, stored):
    return [{"minute": i, "object_store_bytes": s * MB,
             "held": {"learner 7": {"private_bytes": m * MB, "open_files": f}}}
            for i, (m, f, s) in enumerate(zip(memory, files, stored, strict=True))]


def test_the_most_of_each_quarter():
    assert _quarters([5, 1, 2, 3, 9, 4, 0, 8]) == [5, 3, 9, 8]
    assert _quarters([1]) == [0, 0, 0, 1]


def test_what_grows_is_named_and_what_only_moves_is_not():
    flat, moving, growing = [100] * 8, [80, 100] * 4, list(range(100, 180, 10))
    assert _grew(samples(flat, flat, moving)) == []
    assert _grew(samples(growing, flat, moving)) == ["private memory learner 7"]
    assert _grew(samples(moving, [9] * 7 + [10], flat)) == ["open files learner 7"]
    assert _grew(samples(flat, flat, growing)) == ["object store in use"]
    assert _grew(samples([100] * 4 + [104] * 4, flat, flat)) == []  # within 5 %
    assert _grew(samples([10] * 4 + [14] * 4, flat, flat)) == []  # within 5 MB
