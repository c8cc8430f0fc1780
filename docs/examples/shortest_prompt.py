import stoker


class ShortestPrompt(stoker.SchedulingPolicy):
    """Admit the shortest prompt first; break ties by arrival."""

    def admission_order(self, waiting, context):
        return sorted(waiting, key=lambda view: (view.num_prompt_tokens, view.arrival_s))


@stoker.hookimpl
def stoker_register_policies():
    return [
        stoker.PolicyInfo(
            api_version=1,
            name="shortest-prompt",
            summary="Short prompts first",
            factory=ShortestPrompt,
        )
    ]
