"""What web_demo.py shows: the conversation in gradio's words, examples with their answers, answers and maps in HTML."""
