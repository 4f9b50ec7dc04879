"""Judging clips: how near a look is to the brand's, whether the motion stayed, and a report to look at."""
