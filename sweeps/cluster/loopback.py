"""The command `ray` for clusters of several nodes on ONE machine, to try things out.

Type `python sweeps/cluster/loopback.py start --head ...`. Every node is at 127.0.0.1, so that no port can be reached
from elsewhere. The plain command takes the machine's own address in its place, or, told to stay on 127.0.0.1, refuses
a second node.
"""

import os
import sys

from ray._private import services
from ray.scripts.scripts import main

LOOPBACK = "127.0.0.1"
services.resolve_ip_for_localhost = lambda host: host
services.get_node_ip_address = lambda address=None: LOOPBACK
os.environ["RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"] = "0"  # the same for the processes that this one starts
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # else Ray asks, and then reports to its makers

if __name__ == "__main__":
    sys.exit(main())
