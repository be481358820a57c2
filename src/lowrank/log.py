"""The library's logger. Without a handler of the application's, its warnings go to stderr."""

import logging

logger = logging.getLogger("lowrank")
