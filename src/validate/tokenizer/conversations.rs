//! Conversations that chat templates are tried on.

use serde_json::json;

/// What templates are tried on: one question, a system message and several turns, tools, reasoning off.
pub fn conversations() -> Vec<serde_json::Value> {
    let user =
        json!({"role": "user", "content": "What is 2 + 2? <b>Tell me</b>, s'il vous plaît."});
    let system = json!({"role": "system", "content": "You answer in one word."});
    let assistant = json!({"role": "assistant", "content": "<think>\nsimple\n</think>\nFour."});
    let tools = json!([{"type": "function", "function": {
        "name": "weather", "description": "Weather of a place",
        "parameters": {"type": "object", "properties": {"place": {"type": "string"}}, "required": ["place"]}}}]);
    let call = json!({"role": "assistant", "content": "", "tool_calls": [
        {"id": "call_1", "type": "function", "function": {"name": "weather", "arguments": {"place": "Köln"}}}]});
    let answer = json!({"role": "tool", "name": "weather", "tool_call_id": "call_1", "content": "{\"sun\": true}"});
    vec![
        json!({"messages": [user], "add_generation_prompt": true}),
        json!({"messages": [system, user, assistant, user], "add_generation_prompt": true}),
        json!({"messages": [user, assistant], "add_generation_prompt": false}),
        json!({"messages": [user], "add_generation_prompt": true, "enable_thinking": false}),
        json!({"messages": [user, call, answer], "tools": tools, "add_generation_prompt": true}),
    ]
}
