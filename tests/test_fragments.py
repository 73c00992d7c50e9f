"""What each lane of a warp holds in mma.m16n8k16 and gets from ldmatrix, against a second model.

The emulator computes rows and columns from lane and register, as the PTX ISA states the layouts
("Warp Level Matrix Instructions"). Here a fragment is the matrix with its axes taken apart and put
in another order, and some entries are copied from the ISA's figures.
"""

import numpy as np
import programs
import pytest
import torch

pytestmark = pytest.mark.skipif(programs.missing() is not None, reason=str(programs.missing()))
DTYPES = {"bf16": torch.bfloat16, "f16": torch.float16}


def a_fragment(matrix):
    """[16, 16] -> [lane, register, half]: rows are (r0, g), columns (r1, t, half)."""
    return matrix.reshape(2, 8, 2, 4, 2).transpose(1, 3, 2, 0, 4).reshape(32, 4, 2)


def b_fragment(matrix):
    """[16 k, 8 n] -> [lane, register, half]: k is (register, t, half), n is g."""
    return matrix.reshape(2, 4, 2, 8).transpose(3, 1, 0, 2).reshape(32, 2, 2)


def d_fragment(matrix):
    """[16, 8] -> [lane, register]: rows are (r0, g), columns (t, r1)."""
    return matrix.reshape(2, 8, 4, 2).transpose(1, 2, 0, 3).reshape(32, 4)


def ldmatrix(matrices, transposed):
    """[4, 8, 8] -> [lane, matrix, half]."""
    if transposed:
        matrices = matrices.transpose(0, 2, 1)
    return matrices.reshape(4, 32, 2).transpose(1, 0, 2)


def bits(matrix, dtype):
    """A tensor's values as 16-bit patterns."""
    return matrix.to(DTYPES[dtype]).view(torch.int16).numpy().view(np.uint16)


def draw(*shape, seed):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(scope="module")
def probe():
    program = programs.build("probe.cpp")

    def run(*arguments, operands, result, shape):
        raw = b"".join(np.ascontiguousarray(x).tobytes() for x in operands)
        return np.frombuffer(programs.output(program, *arguments, input=raw), result).reshape(shape)

    return run


def test_models_have_the_entries_of_the_figures():
    # Element a[i] of thread T: (row, column) as drawn in "MMA .m16n8k16 fragment layout".
    place = np.arange(256).reshape(16, 16)
    a = a_fragment(place).reshape(32, 8)
    assert [divmod(x, 16) for x in a[0]] == [
        (0, 0), (0, 1), (8, 0), (8, 1), (0, 8), (0, 9), (8, 8), (8, 9)]  # fmt: skip
    assert [divmod(x, 16) for x in a[5]] == [
        (1, 2), (1, 3), (9, 2), (9, 3), (1, 10), (1, 11), (9, 10), (9, 11)]  # fmt: skip
    assert [divmod(x, 16) for x in a[31]] == [
        (7, 6), (7, 7), (15, 6), (15, 7), (7, 14), (7, 15), (15, 14), (15, 15)]  # fmt: skip
    place = np.arange(128).reshape(16, 8)
    b = b_fragment(place).reshape(32, 4)
    assert [divmod(x, 8) for x in b[0]] == [(0, 0), (1, 0), (8, 0), (9, 0)]
    assert [divmod(x, 8) for x in b[30]] == [(4, 7), (5, 7), (12, 7), (13, 7)]
    d = d_fragment(place)
    assert [divmod(x, 8) for x in d[0]] == [(0, 0), (0, 1), (8, 0), (8, 1)]
    assert [divmod(x, 8) for x in d[9]] == [(2, 2), (2, 3), (10, 2), (10, 3)]


@pytest.mark.parametrize("dtype", DTYPES)
def test_mma(probe, dtype):
    a, b, d = draw(16, 16, seed=1), draw(16, 8, seed=2), draw(16, 8, seed=3)
    a[0, 0], a[3, 5] = 2.0**-16, -(2.0**-24)  # subnormal in fp16
    got = probe(
        "mma", dtype,
        operands=(a_fragment(bits(a, dtype)), b_fragment(bits(b, dtype)), d_fragment(d.numpy())),
        result=np.float32, shape=(32, 4),
    )  # fmt: skip
    exact = a.to(DTYPES[dtype]).double() @ b.to(DTYPES[dtype]).double() + d.double()
    np.testing.assert_allclose(got, d_fragment(exact.numpy()), rtol=0, atol=1e-5)


@pytest.mark.parametrize("transposed", [False, True])
def test_ldmatrix(probe, transposed):
    rng = np.random.default_rng(4)
    image = rng.integers(0, 2**16, (128, 8), dtype=np.uint16)
    rows = rng.permutation(128)[:32]  # anywhere, in any order
    got = probe(
        "ldmatrix", *(["trans"] if transposed else []),
        operands=(image, (rows * 16).astype(np.int32)), result=np.uint16, shape=(32, 4, 2),
    )  # fmt: skip
    np.testing.assert_array_equal(got, ldmatrix(image[rows].reshape(4, 8, 8), transposed))


@pytest.mark.parametrize("stored", ["NK", "KN"])
def test_ldmatrix_and_mma_make_a_product(probe, stored):
    a, b = draw(16, 16, seed=5), draw(16, 16, seed=6)  # b is [k, n]
    operands = bits(a, "bf16"), bits(b if stored == "KN" else b.T.contiguous(), "bf16")
    got = probe("product", stored, operands=operands, result=np.float32, shape=(16, 16))
    exact = a.bfloat16().double() @ b.bfloat16().double()
    np.testing.assert_allclose(got, exact.numpy(), rtol=0, atol=1e-5)
