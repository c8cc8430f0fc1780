from collections import Counter

import stoker


class LeastServed(stoker.SchedulingPolicy):
    """The tenant that was served the least is next, and may take a lane from who holds more."""

    def __init__(self):
        self.served = Counter()

    def on_step(self, record):
        # Accounting: what the step computed, by tenant. What was computed again after a
        # preemption (item.recomputed) is nobody's fault but ours, and costs nothing.
        for item in record.scheduled:
            self.served[item.tenant] += item.prefill + item.decode

    def admission_order(self, waiting, context):
        # Who is new starts level with the least served of those that are here, or it would have
        # everything until it has caught up. Who has left is forgotten: state must stay bounded.
        here = [self.served[name] for name in context.tenants if name in self.served]
        start = min(here, default=0)
        self.served = Counter({name: max(start, self.served[name]) for name in context.tenants})
        lanes = {name: tenant.num_running for name, tenant in context.tenants.items()}
        return sorted(waiting, key=lambda v: (self.served[v.tenant], lanes[v.tenant], v.arrival_s))

    def victims(self, candidate, running, context):
        # Preemption: from a tenant that holds at least two lanes more, so that it cannot ask for
        # this one back at once; and of its sequences the one that loses the least work.
        lanes = {name: tenant.num_running for name, tenant in context.tenants.items()}
        own = lanes[candidate.tenant]
        chosen = [view for view in running if lanes[view.tenant] >= own + 2]
        return sorted(chosen, key=lambda view: view.num_computed_tokens)

    def explain(self, admitted, context):
        return f"its tenant was served {self.served[admitted.tenant]} tokens, the least of those waiting"


@stoker.hookimpl
def stoker_register_policies():
    return [
        stoker.PolicyInfo(
            api_version=1,
            name="least-served",
            summary="The least served tenant first",
            factory=LeastServed,
        )
    ]
