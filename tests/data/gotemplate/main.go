// Runs templates through Go's own text/template, to compare our evaluator with it.
// Reads a JSON list of {template, messages, system} and writes a JSON list of {text, failed}.
package main

import (
	"encoding/json"
	"os"
	"strings"
	"text/template"
)

type message struct{ Role, Content string }

type job struct {
	Template string
	Messages []*message
	System   string
}

type result struct {
	Text   string `json:"text"`
	Failed bool   `json:"failed"`
}

func main() {
	var jobs []job
	if err := json.NewDecoder(os.Stdin).Decode(&jobs); err != nil {
		panic(err)
	}
	results := []result{}
	for _, j := range jobs {
		var out strings.Builder
		parsed, err := template.New("").Option("missingkey=zero").Parse(j.Template)
		if err == nil {
			data := map[string]any{"Messages": j.Messages, "System": j.System, "Response": ""}
			err = parsed.Execute(&out, data)
		}
		results = append(results, result{out.String(), err != nil})
	}
	if err := json.NewEncoder(os.Stdout).Encode(results); err != nil {
		panic(err)
	}
}
