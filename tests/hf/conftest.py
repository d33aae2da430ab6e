"""Tests of the bridge to transformers; they skip where it is not installed."""

import os

os.environ["HF_HUB_OFFLINE"] = os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"
