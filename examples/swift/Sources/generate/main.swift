// Decodes with what `mlx-redrafter export --mlxfn` wrote, as examples/cpp/generate.cpp does.
import Foundation
import MLX

func run(_ words: [String]) throws {
    var flags = ["--max-tokens": "100"]
    var prompt: [Int32] = [], said: [Int32] = []
    var index = 1
    while index < words.count {
        if words[index].hasPrefix("--"), index + 1 < words.count {
            flags[words[index]] = words[index + 1]
            index += 1
        } else if let token = Int32(words[index]) {
            prompt.append(token)
        }
        index += 1
    }
    func number(_ flag: String) -> Double { Double(flags[flag] ?? "") ?? 0 }
    if words.isEmpty || prompt.isEmpty {
        throw Failure(
            description: "usage: generate FOLDER TOKEN... [--max-tokens N] [--step NAME] [--temperature T "
                + "--seed N [--top-p P] [--top-k K] [--min-p P]]")
    }

    let text = try Text(folder: URL(fileURLWithPath: words[0]))
    let most = Int(number("--max-tokens")), context = text.manifest.context
    if prompt.count >= context { throw Failure(description: "the prompt is longer than the context") }
    if prompt.contains(where: { $0 < 0 || $0 >= text.manifest.vocabulary }) {
        throw Failure(description: "no such token")
    }
    let filters = ["--top-p", "--top-k", "--min-p"].contains { flags[$0] != nil }
    let sampling = filters ? "filters" : number("--temperature") > 0 ? "temperature" : "greedy"
    let step = try text.function("\(flags["--step"] ?? text.manifest.step)-\(sampling)")
    var settings: [MLXArray] = []
    if sampling != "greedy" {
        let seed = UInt64(flags["--seed"] ?? "") ?? UInt64.random(in: 0 ... UInt64.max)
        settings.append(MLXArray([UInt32(seed >> 32), UInt32(seed & 0xffff_ffff)]))
        settings.append(MLXArray([Float(number("--temperature"))]))
    }
    if filters {
        settings.append(MLXArray([Float(number("--top-p"))]))
        settings.append(integers([Int32(number("--top-k"))], [1]))
        settings.append(MLXArray([Float(number("--min-p"))]))
    }

    try text.readPrompt(prompt)
    var ended = false, steps = 0
    let begun = Date()
    while !ended, said.count < most, text.rows + 1 < context {
        for token in try text.step(step, settings) {
            if ended || said.count == most { break }
            said.append(token)
            print(token, terminator: " ")
            ended = text.manifest.stop.contains(token)
        }
        steps += 1
    }
    print()
    let took = Date().timeIntervalSince(begun) * 1000
    let report =
        "\(said.count) tokens in \(steps) steps, \(Double(said.count) / Double(steps)) tokens per step, "
        + "\(took / Double(steps)) ms per step\n"
    FileHandle.standardError.write(report.data(using: .utf8)!)
}

do {
    let words = Array(CommandLine.arguments.dropFirst())
    let onCPU = words.first.map { folder in
        let manifest = try? String(contentsOfFile: "\(folder)/manifest.json", encoding: .utf8)
        return manifest?.contains("\"device\": \"cpu\"") ?? false
    }
    try Device.withDefaultDevice(onCPU == true ? .cpu : .gpu) { try run(words) }
} catch {
    FileHandle.standardError.write("error: \(error)\n".data(using: .utf8)!)
    exit(2)
}
