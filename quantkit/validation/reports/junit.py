"""The report as JUnit XML: a test case per gate and per metric that was compared with before."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any
from xml.etree import ElementTree as ET  # only written, never parsed

from quantkit.validation.reports.markdown import gate_text, number


def as_junit(document: Mapping[str, Any]) -> str:
    """JUnit XML as CI systems read it: failed gates are failures, undecided ones are skipped."""
    suites = ET.Element("testsuites", name="quantkit validate")
    name = document["checkpoint"]["name"]
    gates = ET.SubElement(suites, "testsuite", name=f"{name} gates")
    for gate in document["gates"]:
        text = gate_text(gate)
        case = _case(gates, f"{gate['metric']}{gate['limit']}", f"{name}.gates")
        if gate["verdict"] == "fail" or not gate["measured"]:
            ET.SubElement(case, "failure", message=text, type=gate["verdict"])
        elif gate["verdict"] == "undecided":
            ET.SubElement(case, "skipped", message=text)
        ET.SubElement(case, "system-out").text = text
    if document["regression"] is not None:
        changes = ET.SubElement(suites, "testsuite", name=f"{name} against the earlier report")
        for change in document["regression"]:
            case = _case(changes, change["metric"], f"{name}.regression")
            text = f"{number(change['old'])} → {number(change['new'])}: {change['verdict']}"
            if change["verdict"] == "worse":
                ET.SubElement(case, "failure", message=text, type="worse")
            elif change["verdict"] == "undecided":
                ET.SubElement(case, "skipped", message=text)
            ET.SubElement(case, "system-out").text = text
    for suite in suites:
        suite.set("tests", str(len(suite)))
        for kind in ("failure", "skipped"):
            found = sum(case.find(kind) is not None for case in suite)
            suite.set("failures" if kind == "failure" else kind, str(found))
    ET.indent(suites)
    return ET.tostring(suites, encoding="unicode", xml_declaration=True) + "\n"


def _case(suite: ET.Element, name: str, group: str) -> ET.Element:
    return ET.SubElement(suite, "testcase", name=name, classname=group)
