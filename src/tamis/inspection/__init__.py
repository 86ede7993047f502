"""What a plan did to one request, to look at: numbers in Python, and one offline page."""

from tamis.inspection.result import Inspection, Steps

__all__ = ["Inspection", "Steps"]
