"""The model server of the NeMo Gym peer: their own base class, an answer that is always the same, at once.

``nemo_peer`` lays this file where NeMo Gym looks for servers, and NeMo Gym runs it.
"""

# NeMo Gym reads the annotations when the class is made.
from nemo_gym.base_responses_api_model import BaseResponsesAPIModelConfig, SimpleResponsesAPIModel
from nemo_gym.openai_utils import (
    NeMoGymChatCompletion,
    NeMoGymChatCompletionCreateParamsNonStreaming,
    NeMoGymResponse,
    NeMoGymResponseCreateParamsNonStreaming,
)

_ANSWER = NeMoGymResponse.model_validate(
    {
        "id": "resp_1",
        "created_at": 0.0,
        "model": "instant",
        "object": "response",
        "output": [
            {
                "id": "msg_1",
                "role": "assistant",
                "status": "completed",
                "type": "message",
                "content": [{"type": "output_text", "text": "ok", "annotations": []}],
            }
        ],
        "parallel_tool_calls": False,
        "tool_choice": "none",
        "tools": [],
    }
)


class InstantModel(SimpleResponsesAPIModel):
    """Says ``ok`` to everything."""

    config: BaseResponsesAPIModelConfig

    async def responses(self, body: NeMoGymResponseCreateParamsNonStreaming) -> NeMoGymResponse:
        """Answer."""
        return _ANSWER

    async def chat_completions(
        self, body: NeMoGymChatCompletionCreateParamsNonStreaming
    ) -> NeMoGymChatCompletion:
        """Refuse: the simple agent does not ask for it."""
        raise NotImplementedError


if __name__ == "__main__":
    InstantModel.run_webserver()
