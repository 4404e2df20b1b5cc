"""From the formulas of generated kernels to Triton's expressions: the formulas are Python on numbers, Triton's are on tiles of them."""

from __future__ import annotations

import ast
import functools

from graphwright.kernels.trees import Unfit

#: What the formulas' functions are called in a Triton kernel; a bare name is one of ``graphwright.kernels.gpu.scalar``.
FUNCTIONS = {
    "tile.exp": "tl.exp", "erf": "tl.erf", "log": "tl.log", "sigmoid": "tl.sigmoid", "magnitude": "tl.abs", "down": "tl.floor", "root": "tl.sqrt",
    "sine": "tl.sin", "cosine": "tl.cos", "up": "tl.ceil",
    **{n: n for n in ("clipped", "even", "exp", "exp2", "expm1", "inward", "less_one", "log1p", "gelu", "gelu_tanh", "larger", "silu", "smaller", "tanh")},
}  # fmt: skip


@functools.lru_cache(4096)
def translated(text: str) -> str:
    """An expression of the formulas, names of its operands filled in, as one over tiles.

    Raises:
        Unfit: it calls what Triton kernels have no function for.
    """
    tree = _Tiles().visit(ast.parse(text, mode="eval"))
    return ast.unparse(ast.fix_missing_locations(tree))


def used(text: str) -> set[str]:
    """The functions of ``graphwright.kernels.gpu.scalar`` that Triton text calls."""
    return {n.func.id for n in ast.walk(ast.parse(text)) if isinstance(n, ast.Call) and isinstance(n.func, ast.Name)} & _OWN


_OWN = {name for name in FUNCTIONS.values() if "." not in name} | {"top"}


class _Tiles(ast.NodeTransformer):
    def visit_IfExp(self, node: ast.IfExp) -> ast.expr:
        test, yes, no = (self.visit(n) for n in (node.test, node.body, node.orelse))
        if isinstance(no, ast.Constant) and no.value is False:
            return ast.BinOp(test, ast.BitAnd(), yes)
        if isinstance(yes, ast.Constant) and yes.value is True:
            return ast.BinOp(test, ast.BitOr(), no)
        return _call("tl.where", test, yes, no)

    def visit_UnaryOp(self, node: ast.UnaryOp) -> ast.expr:
        inner = self.visit(node.operand)
        return ast.Compare(inner, [ast.Eq()], [ast.Constant(0)]) if isinstance(node.op, ast.Not) else ast.UnaryOp(node.op, inner)

    def visit_Call(self, node: ast.Call) -> ast.expr:
        name, args = ast.unparse(node.func), [self.visit(a) for a in node.args]
        if name == "is_not_zero":
            return ast.Compare(args[0], [ast.NotEq()], [ast.Constant(0.0)])
        if name == "real":
            return _real(args[0])
        if name not in FUNCTIONS:
            raise Unfit(f"{name} has no form in Triton")
        return _call(FUNCTIONS[name], *args)


def _real(x: ast.expr) -> ast.expr:
    """A float: a literal, or a tile converted."""
    said = ast.unparse(x).replace(" ", "")
    if said.lstrip("-") in ("inf", "nan"):
        return _call("float", ast.Constant(said))
    try:
        return ast.parse(repr(float(said)), mode="eval").body
    except ValueError:
        return ast.Call(ast.Attribute(x, "to"), [ast.parse("tl.float32", mode="eval").body], [])


def _call(name: str, *args: ast.expr) -> ast.expr:
    return ast.Call(ast.parse(name, mode="eval").body, list(args), [])
