"""Chaos: faults of every kind under load, what clients saw of them direct and through the proxy.

One server, one proxy with two workers and a learner, and a forwarder in front of the server that both roads
lead through, so that a fault of the network hits both alike.  While a fault lasts, clients on both roads go on
(`tests.chaos.load`) and check every answer; when it is over the proxy has to serve again by itself.
"""
