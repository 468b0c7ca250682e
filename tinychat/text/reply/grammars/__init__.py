"""The ways in which models write tool calls, one file each: not one per family.

A grammar has literals (see `literals`) that a probe of the template found, and two methods:

    openings()           texts at which a region of calls may begin
    read(source, region) a generator that reads a region, its opening first; it yields while it
                         waits for text, puts what it finds into `region`, and returns where the
                         region ends. Raises NotACall, or Ended when the text ends before.
"""
from tinychat.text.reply.grammars.json_calls import JsonCalls
from tinychat.text.reply.grammars.named import NamedCalls
from tinychat.text.reply.grammars.python_calls import PythonCalls
from tinychat.text.reply.grammars.region import NotACall, Region
from tinychat.text.reply.grammars.tagged import TaggedCalls

Grammar = JsonCalls | NamedCalls | TaggedCalls | PythonCalls

__all__ = ["Grammar", "JsonCalls", "NamedCalls", "NotACall", "PythonCalls", "Region", "TaggedCalls"]
