"""The bodies of submissions for the OpenAPI document: they are read by hand, after the token has been checked."""

_TEXT = {"type": "string"}
_FILE = {"type": "string", "format": "binary"}
_FILES = {"type": "array", "items": _FILE}

SUBMISSION = {
    "requestBody": {
        "required": True,
        "content": {
            "multipart/form-data": {
                "schema": {
                    "type": "object",
                    "additionalProperties": False,
                    "required": ["model", "images"],
                    "properties": {
                        "model": _TEXT,
                        "images": {**_FILES, "minItems": 1, "maxItems": 64},
                        "surrogates": {**_FILES, "description": "one per image, or none"},
                        "edit": {**_TEXT, "description": "EDITOR:key=value,key=value"},
                        "mask": {**_FILE, "description": "white is what the edit may change"},
                        "box": {"type": "array", "items": _TEXT, "description": "left,top,right,bottom"},
                        "prompt": _TEXT,
                        "external_id": _TEXT,
                        "reason": _TEXT,
                        "due": {"type": "string", "format": "date"},
                        "priority": {"type": "integer", "minimum": -10, "maximum": 10},
                    },
                }
            }
        },
    }
}

BATCH = {
    "requestBody": {
        "required": True,
        "content": {
            "multipart/form-data": {
                "schema": {
                    "type": "object",
                    "additionalProperties": False,
                    "required": ["requests"],
                    "properties": {
                        "requests": {**_FILE, "description": "JSON lines, as `expunge submit --batch` reads them"},
                        "files": {**_FILES, "description": "the pictures, which the lines name by their file names"},
                    },
                }
            }
        },
    }
}
