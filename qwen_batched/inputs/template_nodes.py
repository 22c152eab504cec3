"""Puts hooks into a parsed chat template, wherever Jinja itself calls none."""

from __future__ import annotations

import jinja2
from jinja2 import nodes
from jinja2.visitor import NodeTransformer

# Where a node has what decides: of `and` and `or`, the left side alone.
CONDITIONS = {nodes.If: "test", nodes.CondExpr: "test", nodes.And: "left", nodes.Or: "left", nodes.Not: "node"}


class HookedNodes(NodeTransformer):
    """Puts the hooks of `TemplateEnvironment` into a template, and refuses what it has no use for."""

    def visit_For(self, node: nodes.For) -> nodes.Node:
        size = _size(node.body)
        self.generic_visit(node)
        node.iter = _hook(node, "truth", node.iter)
        if node.test is not None:
            node.test = nodes.And(_step(node, (4, 0)), _hook(node, "truth", node.test)).set_lineno(node.lineno)
        node.body.insert(0, nodes.ExprStmt(_step(node, size)).set_lineno(node.lineno))
        return node

    def visit_Macro(self, node: nodes.Macro) -> nodes.Node:
        size = _size(node.body)
        self.generic_visit(node)
        node.body.insert(0, nodes.ExprStmt(_step(node, size)).set_lineno(node.lineno))
        return node

    visit_CallBlock = visit_Block = visit_Macro

    def visit_condition(self, node: nodes.Node) -> nodes.Node:
        self.generic_visit(node)
        field = CONDITIONS[type(node)]
        setattr(node, field, _hook(node, "truth", getattr(node, field)))
        return node

    visit_If = visit_CondExpr = visit_And = visit_Or = visit_Not = visit_condition

    def visit_Compare(self, node: nodes.Compare) -> nodes.Node:
        self.generic_visit(node)
        node.expr = _hook(node, "compared", node.expr, nodes.Const(False))
        for operand in node.ops:
            operand.expr = _hook(node, "compared", operand.expr, nodes.Const(operand.op in ("in", "notin")))
        return node

    def visit_Concat(self, node: nodes.Concat) -> nodes.Node:
        self.generic_visit(node)
        return _hook(node, "joined", *node.nodes)

    def visit_List(self, node: nodes.List | nodes.Dict) -> nodes.Node:
        self.generic_visit(node)
        return _hook(node, "made", node)

    visit_Dict = visit_List

    def visit_Tuple(self, node: nodes.Tuple) -> nodes.Node:
        self.generic_visit(node)
        return _hook(node, "made", node) if node.ctx == "load" else node

    def visit_Getitem(self, node: nodes.Getitem) -> nodes.Node:
        self.generic_visit(node)
        if not isinstance(node.arg, nodes.Slice):
            return node
        bounds = (node.arg.start, node.arg.stop, node.arg.step)
        return _hook(node, "sliced", node.node, *(nodes.Const(None) if bound is None else bound for bound in bounds))

    def refused(self, node: nodes.Node) -> nodes.Node:
        """Other files, and a switch that rewrites what is printed."""
        raise jinja2.TemplateSyntaxError(f"{type(node).__name__} is not supported in a chat template", node.lineno)

    visit_Include = visit_Import = visit_FromImport = visit_Extends = refused
    visit_ScopedEvalContextModifier = visit_EvalContextModifier = refused


def _hook(node: nodes.Node, name: str, *arguments: nodes.Expr) -> nodes.Call:
    """A call of a method of `TemplateEnvironment`."""
    call = nodes.Call(nodes.EnvironmentAttribute(name), list(arguments), [], None, None)
    return call.set_lineno(node.lineno, override=False)


def _step(node: nodes.Node, size: tuple[int, int]) -> nodes.Call:
    return _hook(node, "step", *map(nodes.Const, size))


def _size(body: list[nodes.Node]) -> tuple[int, int]:
    """How many nodes run, and how many characters are printed as they stand; bodies that count themselves left out."""
    steps, data, pending = 0, 0, list(body)
    while pending:
        node = pending.pop()
        steps += 1
        data += len(node.data) if isinstance(node, nodes.TemplateData) else 0
        if not isinstance(node, (nodes.For, nodes.Macro, nodes.CallBlock, nodes.Block)):
            pending += node.iter_child_nodes()
    return steps, data
